"""Growable Keras layers, and the interface a layer of your own subclasses to grow."""

from tfgrow.layers.activations import register_elementwise
from tfgrow.layers.attention import GroupQueryAttention, MultiHeadAttention
from tfgrow.layers.batch_normalization import BatchNormalization
from tfgrow.layers.conv import Conv1D, Conv2D, Conv3D
from tfgrow.layers.conv_transpose import Conv1DTranspose, Conv2DTranspose, Conv3DTranspose
from tfgrow.layers.dense import Dense
from tfgrow.layers.depthwise_conv import (
    ChannelwiseConv1D,
    ChannelwiseConv2D,
    DepthwiseConv1D,
    DepthwiseConv2D,
)
from tfgrow.layers.einsum_dense import EinsumDense
from tfgrow.layers.embedding import Embedding
from tfgrow.layers.group_normalization import GroupNormalization
from tfgrow.layers.growable import Axes, Channelwise, Growable, GrowableChannelwise, Mixing, Moments
from tfgrow.layers.joins import register_join
from tfgrow.layers.layer_normalization import LayerNormalization, RMSNormalization
from tfgrow.layers.layer_scale import LayerScale
from tfgrow.layers.prelu import PReLU
from tfgrow.layers.stateless import register_channelwise
from tfgrow.layers.unsupported import register_blocked

__all__ = [
    "Axes",
    "BatchNormalization",
    "Channelwise",
    "ChannelwiseConv1D",
    "ChannelwiseConv2D",
    "Conv1D",
    "Conv1DTranspose",
    "Conv2D",
    "Conv2DTranspose",
    "Conv3D",
    "Conv3DTranspose",
    "Dense",
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "EinsumDense",
    "Embedding",
    "GroupNormalization",
    "GroupQueryAttention",
    "Growable",
    "GrowableChannelwise",
    "LayerNormalization",
    "LayerScale",
    "Mixing",
    "Moments",
    "MultiHeadAttention",
    "PReLU",
    "RMSNormalization",
    "register_blocked",
    "register_channelwise",
    "register_elementwise",
    "register_join",
]
