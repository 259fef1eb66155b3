"""local: every device trains alone. The control each exchange is judged against."""

from edge_runtime.methods.interface import A, B, Method

METHOD = Method(
    "local", {"A": A._replace(shared="private"), "B": B._replace(shared="private")}, {}, unequal=True
)
