"""What was learned, in the forms of other tools."""

from typing import Literal

Form = Literal["peft", "gguf", "merged", "merged-gguf", "onnx"]
