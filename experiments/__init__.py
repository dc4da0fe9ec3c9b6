"""Experiments on tfgrow's public surface: data, seed models, figures and tables for the binaries.

The binaries (`python -m experiments.grow`, ...) are built on these modules:

* `datasets`: images in memory, split once, served as `tf.data`;
* `models`: small stock Keras networks to grow from;
* `measures`, `tables`, `figures`: what a run reports.

They need the optional packages of `pip install "tfgrow[experiments]"`.
"""
