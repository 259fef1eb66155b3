"""Moves updates up to the node and global adapters down to devices, in steps that survive crashes.

    device: offer ──> node: grant ──> device: chunks ──> node: check, commit, receipt
    device: want  ──> node: chunks, once for all who listen

Each machine belongs to one thread and is driven by its owner's loop; nothing in it waits:

    message = session.receive(timeout_s)      # None after the timeout is a turn of the loop too
    result = machine.handle(message)
    due_s = machine.tick()                    # until the next tick is of use: the next timeout
"""

from edge_broker.transfer.download import Failed, Fetched, Fetcher
from edge_broker.transfer.publish import Publisher
from edge_broker.transfer.receive import Receiver
from edge_broker.transfer.upload import Committed, Rejected, Uploader

__all__ = ["Committed", "Failed", "Fetched", "Fetcher", "Publisher", "Receiver", "Rejected", "Uploader"]
