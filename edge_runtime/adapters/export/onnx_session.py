"""Loads a graph into ONNX Runtime; imports neither torch nor onnx."""

from pathlib import Path

from onnxruntime import InferenceSession, SessionOptions

from edge_runtime.errors import InputError

MODEL, DATA = "model.onnx", "model.onnx.data"


def session(folder: Path, threads: int = 0, graph: bytes | None = None) -> InferenceSession:
    """A session over the graph of a folder.

    Args:
        folder: with the graph and its data.
        threads: 0 for ONNX Runtime's choice.
        graph: in place of the folder's.

    Raises:
        InputError: ONNX Runtime cannot load the graph.
    """
    options = SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        content = (folder / MODEL).read_bytes() if graph is None else graph
        return InferenceSession(content, options, ["CPUExecutionProvider"])
    # each of its kinds of errors is an Exception
    except Exception as error:
        raise InputError(f"ONNX Runtime cannot load {folder / MODEL}: {error}") from error
