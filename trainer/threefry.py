"""Random words that depend on a key and a counter alone, the same on every backend."""

from __future__ import annotations

import tensorflow as tf


def random_words(seed: int, epoch: tf.Tensor, examples: tf.Tensor, count: int) -> tf.Tensor:
    """Words that depend on (seed, epoch, example) and on nothing else.

    Args:
        seed: 0 to 2^31 - 1.
        epoch: int32 [].
        examples: int32 [n].
        count: even.

    Returns:
        uint32 [n, count], uniform.
    """
    counters = tf.range(count // 2) + tf.zeros_like(examples)[:, tf.newaxis]
    words = threefry(
        tf.constant(seed, tf.uint32),
        tf.bitcast(epoch, tf.uint32),
        tf.bitcast(examples[:, tf.newaxis] + tf.zeros_like(counters), tf.uint32),
        tf.bitcast(counters, tf.uint32),
    )
    return tf.concat(words, axis=1)


def threefry(
    key_0: tf.Tensor, key_1: tf.Tensor, counter_0: tf.Tensor, counter_1: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Threefry-2x32-20: two words of key and two of counter give two random words; all uint32.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    keys = (key_0, key_1, key_0 ^ key_1 ^ tf.constant(0x1BD11BDA, tf.uint32))
    x, y = counter_0 + key_0, counter_1 + key_1
    for group in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x += y
            y = _rotate_left(y, bits) ^ x
        x += keys[(group + 1) % 3]
        y += keys[(group + 2) % 3] + tf.constant(group + 1, tf.uint32)
    return x, y


def _rotate_left(word: tf.Tensor, bits: int) -> tf.Tensor:
    return tf.bitwise.left_shift(word, tf.constant(bits, tf.uint32)) | shift_right(word, 32 - bits)


def shift_right(word: tf.Tensor, bits: int) -> tf.Tensor:
    """Shifts by a number of bits; of signed integers it keeps the sign."""
    return tf.bitwise.right_shift(word, tf.constant(bits, word.dtype))
