"""The baseline: the same steps with PEFT, torch's AdamW and gradient checkpointing.

python -m benchmarks.peft FOLDER           trains FOLDER/job.json; prints time and memory as JSON
python -m benchmarks.peft FOLDER --full    trains all parameters of the model, without an adapter
"""

import sys
import time
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import msgspec
import torch
from transformers import AutoTokenizer

from edge_runtime import settings
from edge_runtime.agent.measure import Taken, typical
from edge_runtime.models import weights
from edge_runtime.models.facts import Facts
from edge_runtime.planning import processes
from edge_runtime.trainer import data
from edge_runtime.trainer.examples import Example, epochs, order_of
from edge_runtime.trainer.job import Job
from edge_runtime.trainer.meter import Meter, prepare
from edge_runtime.trainer.objectives import pad
from edge_runtime.trainer.tokens import Tokenization


def trainer(
    facts: Facts,
    depth: int,
    format: settings.Weights,
    spec: settings.Adapter,
    training: settings.Training,
    device: str,
    *,
    full: bool = False,
) -> Callable[[list[Example]], float]:
    """Load the model and return a function that makes one step on rows and returns their loss.

    full: train every parameter instead of an adapter.
    """
    from peft import LoraConfig, get_peft_model

    # transformers 5.0 needs gradient_checkpointing_enable, which warns
    warnings.filterwarnings("ignore", category=FutureWarning)
    model = weights.load(facts, depth, "bfloat16" if format in settings.PACKED else format, device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(
        r=spec.rank, lora_alpha=int(spec.alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = (model.requires_grad_(True) if full else get_peft_model(model, config)).train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=training.weight_decay)

    def run(rows: list[Example]) -> float:
        ids, labels = pad(rows, torch.device(device))
        loss = adapted(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, training.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return float(loss.detach())

    return run


def main() -> None:
    """Do the job of the folder named on the command line."""
    job = msgspec.json.decode((Path(sys.argv[1]) / "job.json").read_bytes(), type=Job)
    prepare(job.machine)
    meter = Meter(job.machine.device)
    with meter.phase("load"):
        tokenizer = AutoTokenizer.from_pretrained(job.facts.folder)
        how = Tokenization(tokenizer, job.facts.vocabulary, job.plan.tokens)
        examples = how.examples(data.stream(Path(job.data)))
        full = "--full" in sys.argv[2:]
        run = trainer(
            job.facts,
            job.plan.depth,
            job.plan.weights,
            job.fleet.adapter.at(job.plan.rank),
            job.fleet.training,
            job.machine.device,
            full=full,
        )
    rows, losses, seconds = epochs(examples, order_of(job.fleet.seed, job.round)), [], []
    with meter.phase("train"):
        for _ in range(job.fleet.training.steps):
            began = time.monotonic()
            losses.append(run(list(islice(rows, job.fleet.training.rows_a_step))))
            seconds.append(time.monotonic() - began)
    taken = Taken(
        processes.runtime_bytes(),
        meter.peak_bytes,
        typical(seconds),
        meter.phases,
        losses,
        meter.seconds["load"],
    )
    sys.stdout.write(msgspec.json.encode(taken).decode() + "\n")


if __name__ == "__main__":
    main()
