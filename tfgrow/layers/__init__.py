"""Growable Keras layers, and the interface a layer of your own subclasses to grow."""

from tfgrow.layers.activations import register_elementwise
from tfgrow.layers.attention import GroupQueryAttention, MultiHeadAttention
from tfgrow.layers.batch_normalization import BatchNormalization
from tfgrow.layers.conv import Conv1D, Conv2D, Conv3D
from tfgrow.layers.dense import Dense
from tfgrow.layers.depthwise_conv import DepthwiseConv2D
from tfgrow.layers.growable import Axes, Channelwise, Growable, GrowableChannelwise, Mixing, Moments
from tfgrow.layers.joins import register_join
from tfgrow.layers.prelu import PReLU
from tfgrow.layers.stateless import register_channelwise

__all__ = [
    "Axes",
    "BatchNormalization",
    "Channelwise",
    "Conv1D",
    "Conv2D",
    "Conv3D",
    "Dense",
    "DepthwiseConv2D",
    "GroupQueryAttention",
    "Growable",
    "GrowableChannelwise",
    "Mixing",
    "Moments",
    "MultiHeadAttention",
    "PReLU",
    "register_channelwise",
    "register_elementwise",
    "register_join",
]
