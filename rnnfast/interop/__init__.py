"""Weights and configurations from and to other libraries, each in a module of its name, which needs that library::

    from rnnfast.interop import keras

    layer = keras.from_keras(keras_layer)

``keras``: layers of Keras 3. ``onnx``: nodes of ONNX. ``flax``: cells of flax.linen. Weights are copied. What a
library's layer has and ours has not is refused by its name. ``opacus``: our layers in private training.
"""
