"""The convergence stage: how far a method's states, and their denoised estimates, are from the data at every node."""

from pathlib import Path

import pandas as pd
from tqdm import tqdm

from anisodiff.compute import CPU, Compute
from anisodiff.errors import naming
from anisodiff.methods import Method, Sampler
from anisodiff.metrics import frechet
from anisodiff.metrics.cells import load_reference
from anisodiff.metrics.feature_networks import extractor
from anisodiff.metrics.registry import FeatureFile
from anisodiff.solvers.generation import batches, finished
from anisodiff.storage.files import version, write_text


def node_distances(
    method: Method,
    nfe: int,
    images: int,
    batch: int,
    features: FeatureFile,
    reference: Path,
    output: Path,
    compute: Compute = CPU,
) -> None:
    """Frechet distance of sampling and denoising trajectory at every node (arXiv:2506.10177, Figure 8).

    The denoised estimate at a node is what a jump from there returns, for one evaluation more than were made (ODE-Jump;
    on searched levels GITS-Jump).

    Args:
        method: its settings and files.
        nfe: its budget.
        images: seeds 0 to this, exclusive.
        batch: images at a time.
        features: the feature network.
        reference: feature statistics of the data.
        output: CSV file.
        compute: where, and in which precision.
    """
    compute.begin()
    sampler, truth = Sampler(method, compute), load_reference(reference, features.kind).gaussian
    extract = extractor(*features, compute.device)
    levels, step = sampler.solver(nfe, sampler.files.grid(nfe, [nfe]))
    above = int((levels.nodes > 0).all(2).all(1).sum())  # nodes where there is something to denoise
    evaluations: list[int] = []
    gathered: dict[tuple[int, str], frechet.FeatureStatistics] = {}
    for chosen, padded in tqdm(list(batches(range(images), batch)), desc="convergence", unit="batch", mininterval=5):
        recorded = sampler.trajectory(padded, levels, step)
        evaluations = recorded.evaluations
        for kind, nodes in (("state", recorded.states), ("denoised", recorded.denoise_every_node()[:above])):
            for node, z in enumerate(nodes):
                with naming(f"node {node}", "train its network and path again with lower rates, or sample in float32"):
                    images_there = finished(sampler.denoiser, z, chosen, f"NFE {nfe}, {kind}")
                found = extract(images_there)
                gathered.setdefault((node, kind), frechet.FeatureStatistics(found.shape[1])).add(found)
    rows = [
        {
            "node": node,
            "kind": kind,
            "evaluations": evaluations[node] + (kind == "denoised"),
            "level": float(levels.nodes[node].mean()),
            "distance": frechet.distance(statistics.gaussian, truth),
            "images": statistics.count,
            "features": features.kind,
            "version": version(),
        }
        for (node, kind), statistics in gathered.items()
    ]
    write_text(output, pd.DataFrame(rows).to_csv(index=False))
