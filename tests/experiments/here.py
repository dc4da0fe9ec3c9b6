"""Cells of experiments, run where other tests run too."""

import keras

from experiments import training


def spare_the_process(patch):
    """Cells leave threads and order of sums, which other tests share, as they are."""
    patch.setattr(training, "make_repeatable", keras.utils.set_random_seed)
    patch.setattr("tensorflow.config.threading.set_intra_op_parallelism_threads", int)
    patch.setattr("tensorflow.config.threading.set_inter_op_parallelism_threads", int)
