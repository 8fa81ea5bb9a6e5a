import pytest
import tensorflow as tf

from trainer.threefry import random_words, threefry


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # of the authors' own collection of known answers
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_threefry_known_answers(key, counter, expected, jit_compile):
    function = tf.function(threefry, jit_compile=jit_compile)
    given = [tf.constant(word, tf.uint32) for word in (*key, *counter)]
    assert tuple(int(word) for word in function(*given)) == expected


def test_random_words_are_keyed_by_seed_epoch_and_example():
    words = random_words(2**31 - 1, tf.constant(5), tf.constant([9, 4]), 6).numpy()
    for row, example in enumerate((9, 4)):
        for counter in range(3):
            given = (2**31 - 1, 5, example, counter)
            pair = threefry(*(tf.constant(word, tf.uint32) for word in given))
            assert [int(word) for word in pair] == [words[row, counter], words[row, 3 + counter]]
