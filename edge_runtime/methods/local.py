"""local: every device trains alone. The control each exchange is judged against."""

from edge_runtime.methods.interface import Factor, Method

METHOD = Method(
    "local",
    {
        "A": Factor(trained=True, shared="private", start="drawn"),
        "B": Factor(trained=True, shared="private", start="zero"),
    },
    None,
    unequal=True,
)
