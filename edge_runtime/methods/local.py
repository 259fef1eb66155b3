"""local: every device trains alone. The control that each exchange is compared with."""

from edge_runtime.methods.interface import A, B, Method

METHOD = Method(
    "local", {"A": A._replace(shared="private"), "B": B._replace(shared="private")}, {}, unequal="mean"
)
