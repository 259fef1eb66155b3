"""The command line `edge-runtime`: one file a command, and what turns an error into an exit code.

A command file holds options, one call into the package, and the output. The file imports the
package inside the command, so that a resident agent does not hold the imports of other commands.
click.echo flushes each line, because another program may read the lines as they come.

Standard output may have no UTF-8, or be closed: `main` makes it safe for all that is printed later.
"""

import io
import logging
import os
import signal
import sqlite3
import sys

import click

from edge_runtime.cli import (
    agent,
    aggregator,
    broker,
    classify,
    demo,
    export,
    generate,
    measure,
    plan,
    profile,
    serve,
    status,
    study,
)
from edge_runtime.errors import EdgeError, InputError, UnreachableError

log = logging.getLogger(__name__)
# In the order of a first use; --help sorts by name.
COMMANDS = (
    *(profile, plan, measure, broker, aggregator, agent, status, export, generate, classify, serve),
    *(study, demo),
)
INTERRUPTED = 130  # as a shell has it for SIGINT


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="edge-runtime", message="%(prog)s %(version)s")
def app() -> None:
    """Unequal devices fine-tune language models on their data and learn together over MQTT."""


for module in COMMANDS:
    app.add_command(module.command)


def main() -> None:
    """Run the command line. An error becomes one sentence on stderr and an exit code."""
    from edge_broker.errors import BadFile, BrokerError
    from edge_profiles import ProfileError

    _in_utf8()
    _open_streams()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # a script's background processes ignore SIGINT; click would end with 1 on it
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: sys.exit(INTERRUPTED))
    try:
        app(prog_name="edge-runtime")
    except EdgeError as error:
        _fail(str(error), error.exit_code)
    except ProfileError as error:
        _fail(str(error), InputError.exit_code)
    except BadFile as error:
        _fail(str(error), InputError.exit_code)
    except BrokerError as error:
        _fail(str(error), UnreachableError.exit_code)
    except ModuleNotFoundError as error:
        # a missing module of this project is a fault of ours, which its traceback explains
        if (error.name or "").startswith("edge_"):
            raise
        _fail(
            f"the package {error.name} is not installed: in a clone of Edge Runtime, run pip install '.[agent]' on a "
            "device, or '.[aggregator]' on the node",
            InputError.exit_code,
        )
    except UnicodeEncodeError as error:
        characters = error.object[error.start : error.end]
        _fail(f"{characters!a} in a name or a text is not UTF-8: give it another name", InputError.exit_code)
    except (OSError, sqlite3.DatabaseError) as error:  # a full disk, missing rights, a damaged file
        log.debug("", exc_info=True)
        _fail(f"a file cannot be read or written: {error}; earlier state is unchanged", InputError.exit_code)


def _in_utf8() -> None:
    """Start again in Python's UTF-8 mode where file names would have the locale's encoding.

    Fleet files name models in UTF-8, and tokenizers and safetensors read paths as UTF-8 whatever
    the locale. Output keeps the locale's encoding.
    """
    if sys.getfilesystemencoding() == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"  # of child processes
    if sys.stdout is not None:
        os.environ["PYTHONIOENCODING"] = sys.stdout.encoding
    command = [sys.executable, "-X", "utf8", "-m", "edge_runtime.cli", *sys.argv[1:]]
    os.execv(sys.executable, command)


def _open_streams() -> None:
    """Replace streams that are closed, and characters that the terminal's encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # a file or socket would get the stream's number, and all that libraries print there
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> None:
    sys.stderr.write(f"edge-runtime: {message}\n")
    sys.exit(code)
