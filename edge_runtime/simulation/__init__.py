"""A grid of methods by seeds on virtual devices: the trainer, the methods and the codec of real ones, without a broker."""
