"""Changes to other libraries' internals, one file each; this room imports no other room."""
