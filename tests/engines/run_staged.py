"""Runs a pipeline that was staged for Dataflow on the runner in this process; prints its metrics.

python -I -S tests/engines/run_staged.py PIPELINE PACKAGES SITE

PIPELINE is the staged graph, PACKAGES a folder in which the staged package was installed, SITE
where all other packages are. Started in this way, Python looks nowhere else: not in the folder
this file is in, and not where an editable installation points.
"""

import json
import sys
from pathlib import Path

PARTS = ("count", "sum", "min", "max")


def main(graph: str, packages: str, site: str) -> None:
    """Runs it to its end."""
    sys.path[:0] = [packages]
    sys.path.append(site)

    import pipeline

    assert Path(pipeline.__file__).is_relative_to(packages), pipeline.__file__

    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability.api import beam_runner_api_pb2
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import EmbeddedPythonEnvironment

    proto = beam_runner_api_pb2.Pipeline.FromString(Path(graph).read_bytes())
    here = EmbeddedPythonEnvironment.default().to_runner_api(None)
    for environment in proto.components.environments.values():  # instead of the image
        environment.CopyFrom(here)
    result = FnApiRunner().run_via_runner_api(proto, PipelineOptions([]))
    assert result.wait_until_finish() == "DONE"
    for name, module in sys.modules.items():
        if name.partition(".")[0] in ("pipeline", "trainer"):
            assert Path(module.__file__ or packages).is_relative_to(packages), module
    found = result.metrics().query()
    counters = [_named(entry, {"scalar": entry.committed}) for entry in found["counters"]]
    distributions = [
        _named(entry, {"distribution": {name: getattr(entry.committed, name) for name in PARTS}})
        for entry in found["distributions"]
    ]
    print(json.dumps([update for pair in counters + distributions for update in pair]))


def _named(entry: object, value: dict) -> list[dict]:
    """A metric as Dataflow's interface has it: twice, once as tentative."""
    context = {"step": entry.key.step, "namespace": entry.key.metric.namespace}
    name = {"origin": "user", "name": entry.key.metric.name}
    return [
        {"name": name | {"context": context | tentative}} | value
        for tentative in ({}, {"tentative": "true"})
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
