"""Studies: methods by seeds on virtual devices, with the code of real devices but no broker."""
