"""fedit: the weighted mean of A and of B inside a model class.

    A <- A + Σ_k p_k dA_k,   B <- B + Σ_k p_k dB_k,   p_k = n_k / Σ n over the devices k that hold the tensor

Devices with fewer layers hold fewer tensors, so the mean is taken tensor by tensor over its holders, as in
Zhang et al. 2023 (arXiv 2305.05644, FedIT) with the depth rule of Diao et al. 2021 (arXiv 2010.01264, HeteroFL).
A mean of factors is not the factors of the mean product; the method is known to be biased there.
"""

from edge_runtime.methods.interface import Contributions, Factor, Method, Tensors, add_to


def holders_mean(contributions: Contributions) -> Tensors:
    """The mean delta of every tensor over the devices that sent it; one sum a tensor, whatever the number of devices."""
    sums: Tensors = {}
    samples: dict[str, int] = {}
    for made in contributions():
        for key, value in made.delta.items():
            add_to(sums, key, made.samples * value)
            samples[key] = samples.get(key, 0) + made.samples
    return {key: value / float(samples[key]) for key, value in sums.items()}


METHOD = Method(
    "fedit",
    {
        "A": Factor(trained=True, shared="class", start="drawn"),
        "B": Factor(trained=True, shared="class", start="zero"),
    },
    holders_mean,
)
