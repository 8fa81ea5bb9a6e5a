import json
from pathlib import Path

import helpers
import numpy as np
import numpy_twin
import pytest
import replica_losses

SCRIPT = Path(replica_losses.__file__)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_replicas_agree_with_numpy(replicas):
    """The losses and weights of plain float64 training on the same global batches.

    To 1e-5: float32, and sums over replicas in another order, explain no more than that.
    """
    done = helpers.run_python(SCRIPT, replicas, env={"CUDA_VISIBLE_DEVICES": "-1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["replicas"] == replicas
    own_device = [["CPU", str(i)] for i in range(replicas)]
    assert found["placed"] == own_device * 2  # images and labels
    for copies in ("initial", "weights", "slots"):
        assert len(found[copies]) == replicas
        assert all(copy == found[copies][0] for copy in found[copies])  # equal, bit for bit

    expected = plain_training([np.array(weight) for weight in found["initial"][0]])
    for steps, (loss, right) in zip(replica_losses.CALLS, found["calls"], strict=True):
        assert loss == pytest.approx(sum(expected["losses"][steps]), rel=1e-5), steps
        assert right == sum(expected["correct"][steps]), steps
    for i, weight in enumerate(expected["weights"]):
        np.testing.assert_allclose(
            found["weights"][0][i], weight, rtol=0, atol=1e-5, err_msg=f"weight {i}"
        )
    assert found["slots"][0][-1] == len(expected["losses"])  # steps counted once each

    loss, right = found["evaluation"]
    assert loss == pytest.approx(expected["evaluation"][0], rel=1e-5)
    assert right == expected["evaluation"][1]


def plain_training(weights):
    """The same in NumPy: one device, batches without padding."""
    (images, labels), indices, mask = replica_losses.problem()
    images = images.astype(np.float64)
    adam = numpy_twin.Adam(weights, **replica_losses.ADAM)
    losses, correct = [], []
    for rows in (row[use == 1] for row, use in zip(indices, mask, strict=True)):
        batch = images[rows], labels[rows]
        losses.append(numpy_twin.losses(weights, *batch).sum())
        correct.append(numpy_twin.correct(weights, *batch))
        weights = adam.step(weights, numpy_twin.gradients(weights, *batch))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])  # the steps are long enough to matter
    return {
        "losses": losses,
        "correct": correct,
        "weights": weights,
        "evaluation": (
            numpy_twin.losses(weights, images, labels).sum(),
            numpy_twin.correct(weights, images, labels),
        ),
    }
