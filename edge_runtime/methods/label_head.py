"""A linear head that tells labels apart by the last token's hidden state, beside any method's adapter.

    logit of a label = h / rms(h) · H        H: one row a label, 0 at the start

Rows go by their label's name: devices that know other labels have other rows. Labels that a device has never met reach it
through the class's version, and its own rows teach it that they are none of these. What it makes of such a row serves it alone
and is not sent: each row's mean is over the devices that were shown its label, by their rows or by the fleet's predictions. With
the others in that mean, each round pushes a label that few devices have away from all rows (see docs/study). So a delta's keys
tell which labels a device has.
"""

from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import Factor, Method
from edge_runtime.settings import Head

H = Factor(("one", "in"), trained=True, shared="class", start="zero", of="labels")


def added(method: Method, head: Head) -> Method:
    """The method with a head; it stays private where the fleet says so, and where the method exchanges nothing."""
    if head.shared == "private" or not method.merges:
        return method._replace(factors={**method.factors, "H": H._replace(shared="private")})
    return method._replace(
        factors={**method.factors, "H": H}, merges={**method.merges, "labels": holders_mean}
    )
