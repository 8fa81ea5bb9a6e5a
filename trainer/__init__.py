"""The training program: a multilayer perceptron on TensorFlow's Core APIs."""
