"""prelort: the leading ranks of each adapter work alone, so that devices of lower ranks can take them.

    segment s of a version, the ranks between one device's rank and the next higher:
    A_s <- A_s + Σ_k p_k dA_k,s,   B_s <- B_s + Σ_k p_k dB_k,s
    p_k = n_k / Σ n over the devices that hold the segment

    step i of a device:   y = W x + scale · B[:, :r_i] A[:r_i] x
    r_i: in turn the device's rank, and each lower rank of the fleet

No entry is diluted by devices that do not hold it. The steps in lower ranks move what all devices
can use into the leading ranks; higher ranks learn the remainder. In a fleet of one rank the method
is fedit. A device sends and computes no more than with fedit.
Source: arXiv 2606.15963 (PreLort). The paper's abstract has the segments' mean and training in
several ranks; the weights p_k and taking turns are ours.
"""

from edge_runtime.methods import fedit
from edge_runtime.methods.fedit import holders_mean
from edge_runtime.methods.interface import Method

METHOD = Method("prelort", fedit.METHOD.factors, {"layers": holders_mean}, unequal="mean", nested=True)
