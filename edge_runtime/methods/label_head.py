"""A linear head that classifies by the last token's hidden state, beside any method's adapter.

    logit of a label = h / rms(h) · H        H: one row a label; head_start.py has where it begins
    logit of a label = h / rms(h) · K        of a label that no device of the class has examples of
    shared = "fleet"                         M h / rms(h) · H, M the device's map into the common frame

Rows are named by their label, so devices that know different labels have different rows. A device
also gets rows of labels that it was never shown, through the class's version; its own rows teach it
that they have none of these labels. A device does not send such a row: the node averages a label's
row over the devices that were shown the label, by their own rows or by the fleet's predictions.
With the remaining devices in that mean, each round would push a label that few devices have away
from all rows (see docs/study). So a delta's keys tell which labels a device was shown.

K is a row that devices have from the fleet's predictions alone. They make it anew in each round
(trainer/head.py). Once a device of the class has examples of the label, the class's version has H,
which is not made anew, and all devices go on with H.
"""

from edge_runtime.methods import frames
from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import Factor, Method
from edge_runtime.settings import Head

H = Factor(("one", "in"), trained=True, shared="class", start="zero", of="labels")


def added(method: Method, head: Head) -> Method:
    """The method with a head, private where the fleet says so or nothing is exchanged."""
    if head.shared == "fleet":
        in_frame = H._replace(axes=("one", "frame"), shared="fleet")
        return method._replace(
            factors={**method.factors, "H": in_frame, "M": frames.M},
            merges={**method.merges, "labels": holders_mean},
        )
    if head.shared == "private" or not method.merges:
        row = H._replace(shared="private")
        return method._replace(factors={**method.factors, "H": row, "K": row})
    return method._replace(
        factors={**method.factors, "H": H, "K": H}, merges={**method.merges, "labels": holders_mean}
    )
