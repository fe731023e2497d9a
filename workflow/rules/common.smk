# needs: the configuration.   makes: CONFIG, resolved and checked, and functions from names to files.   next: inputs.smk
import json
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(Path(workflow.basedir).parent))

from anisodiff.config import load_schema, resolve
from anisodiff.files import StageError

try:
    CONFIG = resolve(config, load_schema(Path(workflow.basedir) / "schemas/config.schema.yaml"))
except StageError as error:
    raise WorkflowError(str(error))
DATASETS = CONFIG["datasets"]
DEVICE = CONFIG["device"]
ENVIRONMENT = "../../envs/environment.yaml"

DATASET_KEYS = ("source", "labels", "flips", "heldout", "sigma_data", "sigma_min", "sigma_max", "g_min")
RESULTS = "results/{dataset}"


wildcard_constraints:
    dataset="[a-z][a-z0-9-]*",
    run="[a-z][a-z0-9-]*",
    path="[a-z][a-z0-9-]*",
    warp="[a-z][a-z0-9-]*",
    method="[a-z][a-z0-9-]*",
    nfe="[0-9]+",
    first="[0-9]+",
    last="[0-9]+",


def as_json(settings):
    return json.dumps(settings, sort_keys=True)


def dataset_json(wildcards):
    """What a stage must know of its dataset; the rest of its configuration can change without rerunning it."""
    return as_json({key: DATASETS[wildcards.dataset][key] for key in DATASET_KEYS})


def section(name, key):
    """Function of the wildcards: the JSON of one entry of the dataset's configuration."""
    return lambda wildcards: as_json(DATASETS[wildcards.dataset][name][getattr(wildcards, key)])


def fetched(dataset, kind):
    return f"results/{dataset}/fetched/{Path(DATASETS[dataset][kind]['url']).name}"


def network_file(dataset, name):
    return fetched(dataset, "base") if name == "base" else f"results/{dataset}/runs/{name}/network.safetensors"


def path_file(dataset, name):
    folder = f"results/{dataset}"
    return f"{folder}/runs/{name}/path.safetensors" if name in DATASETS[dataset]["runs"] else f"{folder}/paths/{name}.safetensors"


def warp_files(dataset, method, nfes):
    """No file, one for all budgets, or one for each."""
    name = DATASETS[dataset]["methods"][method].get("warp")
    if name is None:
        return []
    if DATASETS[dataset]["warps"][name]["steps"] == "per_nfe":
        return [f"results/{dataset}/warps/{name}-nfe{nfe}.safetensors" for nfe in nfes]
    return [f"results/{dataset}/warps/{name}.safetensors"]


def ranges(dataset, nfe):
    sampling = DATASETS[dataset]["sampling"]
    return sampling["ranges_at"].get(str(nfe), sampling["ranges"])


def budgets(dataset, first):
    """Budgets whose seed ranges reach the image `first`."""
    sampling = DATASETS[dataset]["sampling"]
    return [nfe for nfe in sampling["nfe"] if int(first) < ranges(dataset, nfe) * sampling["images"]]


def shards(dataset):
    """First and last seed of every sampling job: fixed ranges, so that a new one leaves the others as they are."""
    sampling = DATASETS[dataset]["sampling"]
    images, shard = sampling["images"], sampling["shard"]
    for index in range(max(ranges(dataset, nfe) for nfe in sampling["nfe"])):
        for first in range(index * images, (index + 1) * images, shard):
            yield first, min(first + shard, (index + 1) * images) - 1


def manifests(dataset):
    methods = DATASETS[dataset]["methods"]
    return [f"results/{dataset}/samples/{method}/{a}-{b}.json" for method in methods for a, b in shards(dataset)]


def results_of(dataset):
    return [f"results/{dataset}/table.csv", f"results/{dataset}/plots"]


def pretrained_of(dataset):
    made = [f"results/{dataset}/pretrained/base.safetensors"]
    if DATASETS[dataset]["features"]["kind"] == "digits-cnn":
        made.append(f"results/{dataset}/pretrained/features.safetensors")
    return made
