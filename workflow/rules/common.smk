# needs: the configuration.   makes: CONFIG, resolved and checked, and functions from names to files.   next: inputs.smk
import json
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(workflow.basedir).parent))

from anisodiff.experiment import planning
from anisodiff.experiment.budgets import budgets, grid_nfe, strip_methods
from anisodiff.experiment.config import basis_of, load_schema, resolve
from anisodiff.experiment.config_text import check_text
from anisodiff.data.sources import BUILT_IN
from anisodiff.data.download import file_state, is_pickle, on_this_machine, address_path, scheme, to_fetch
from anisodiff.errors import StageError
from anisodiff.storage.files import write_text

try:
    if workflow.is_main_process:
        for file in workflow.configfiles:
            check_text(Path(file))
    CONFIG = resolve(config, load_schema(Path(workflow.basedir) / "schemas/config.schema.yaml"))
except StageError as error:
    sys.exit(f"anisodiff: {error}")  # one line, on stderr in dry runs too
DATASETS = CONFIG["datasets"]
ENVIRONMENT = "../../envs/environment.yaml"

PUBLISHED = os.path.relpath(Path(workflow.basedir).parent / "config/published.csv")
DATASET_KEYS = ("class_conditional", "flips", "heldout", "sigma_data", "sigma_min", "sigma_max", "g_min")


def configured(section):
    """Pattern of the names of a section of any dataset; what is not configured has no rule."""
    names = {name for dataset in DATASETS.values() for name in dataset[section]}
    return "|".join(map(re.escape, sorted(names))) or "(?!)"


wildcard_constraints:
    dataset="|".join(map(re.escape, DATASETS)),
    run=configured("runs"),
    path=configured("paths"),
    basis=configured("bases"),
    warp=configured("warps"),
    search=configured("searches"),
    geometry=configured("geometry"),
    method=configured("methods"),
    nfe="[0-9]+",
    first="[0-9]+",
    last="[0-9]+",


def option(name, values):
    """An option of a stage, once for each of these values (a list, or one): a list, which `:q` quotes one by one."""
    values = [values] if isinstance(values, (str, int)) else values
    return [each for value in values for each in (f"--{name}", str(value))]


def as_json(settings):
    return json.dumps(settings, sort_keys=True)


def dataset_json(wildcards):
    """What a stage must know of its dataset; the rest of its configuration can change without rerunning it."""
    return as_json({key: DATASETS[wildcards.dataset][key] for key in DATASET_KEYS})


def compute_json():
    """Device, precision and compilation. Threads are not among them: another number of cores reruns nothing."""
    return as_json({key: CONFIG[key] for key in ("device", "dtype", "compile")})


def entry(wildcards, name, key):
    """One entry of a section of the dataset's configuration: that which the wildcard `key` names."""
    return DATASETS[wildcards.dataset][name][getattr(wildcards, key)]


def section(name, key, without=()):
    """Function of the wildcards: the JSON of one entry of the dataset's configuration, but for what reaches its stage as
    files or options."""

    def settings(wildcards):
        chosen = entry(wildcards, name, key)
        return as_json({each: value for each, value in chosen.items() if each not in without})

    return settings


def fetched(url):
    """Where a published file is put: by host and path, so that data sets share it."""
    return f"results/fetched/{address_path(url)}"


FETCHED = {fetched(url): {"url": url} | hashes for url, hashes in to_fetch(DATASETS).items()}


def state_of(url):
    """A file_state of a file or a folder of the user's own, so that another one in its place is read anew. Jobs of their
    own, which take it as it is, do without."""
    path = on_this_machine(url)
    return file_state(path) if workflow.is_main_process and path is not None and url not in BUILT_IN else ""


def images_url(wildcards):
    return DATASETS[wildcards.dataset]["images"]["url"]


def images_source(wildcards):
    """What the images are read from, if it is one file; a folder or a built-in set is no input."""
    url = images_url(wildcards)
    if scheme(url):
        return fetched(url)
    # braces are wildcards to Snakemake
    return [url.replace("{", "{{").replace("}", "}}")] if url not in BUILT_IN and Path(url).is_file() else []


def images_options(wildcards):
    """Source, fit, and the hash of what is read where it is."""
    images = DATASETS[wildcards.dataset]["images"]
    source = fetched(images["url"]) if scheme(images["url"]) else images["url"]
    options = {"source": source, "transform": images["transform"], "resolution": images["resolution"]}
    if not scheme(images["url"]):
        options |= {"sha256": images["sha256"], "md5": images["md5"]}
    return [each for name, value in options.items() if value is not None for each in option(name, value)]


def features_file(wildcards):
    return fetched(DATASETS[wildcards.dataset]["features"]["url"])


def reference_statistics(wildcards):
    """The published ones, where the configuration names any."""
    named = DATASETS[wildcards.dataset]["reference"]
    return [] if named is None else fetched(named["url"])


def base_file(dataset):
    """The base network: fetched, and converted where it is one of EDM's pickles."""
    url = DATASETS[dataset]["base"]["url"]
    return f"results/{dataset}/base.safetensors" if is_pickle(url) else fetched(url)


def network_file(dataset, name):
    return base_file(dataset) if name == "base" else f"results/{dataset}/runs/{name}/network.safetensors"


def path_file(dataset, name):
    folder = f"results/{dataset}"
    return (
        f"{folder}/runs/{name}/path.safetensors"
        if name in DATASETS[dataset]["runs"]
        else f"{folder}/paths/{name}.safetensors"
    )


def file_of(find, name, key, field):
    """Function of the wildcards: the file of a network or a path (`find`) that an entry of a section names in a field."""
    return lambda wildcards: find(wildcards.dataset, entry(wildcards, name, key)[field])


def basis_file(name, key):
    """Function of the wildcards: the basis that an entry of `paths` or `runs` is on, if it is on one."""

    def file(wildcards):
        basis = basis_of(entry(wildcards, name, key)["subspaces"])
        return [] if basis is None else f"results/{wildcards.dataset}/bases/{basis}.safetensors"

    return file


def basis_option(wildcards, input):
    return option("basis", input.basis)


def grid_files(dataset, method, nfes):
    """What a method's grid comes from: no file, one for all budgets, or one for each."""
    if search := DATASETS[dataset]["methods"][method].get("search"):
        return [f"results/{dataset}/searches/{search}.safetensors"]
    name = DATASETS[dataset]["methods"][method].get("warp")
    if name is None:
        return []
    if DATASETS[dataset]["warps"][name]["steps"] == "per_nfe":
        return [f"results/{dataset}/warps/{name}/nfe{nfe}.safetensors" for nfe in nfes]
    return [f"results/{dataset}/warps/{name}.safetensors"]


def budgets_at(dataset, method, first):
    """Budgets whose seed ranges reach the image `first`."""
    sampling = DATASETS[dataset]["sampling"]
    every = budgets(DATASETS[dataset], method)
    return [nfe for nfe in every if int(first) < planning.ranges(sampling, nfe) * sampling["images"]]


def manifests(dataset):
    return [
        f"results/{dataset}/samples/{method}/{first}-{last}.json"
        for method in DATASETS[dataset]["methods"]
        for first, last in planning.shards(DATASETS[dataset], method)
    ]


def lost_file(manifest):
    """A note of the cells that a manifest names and that are not there. Cells are no outputs that Snakemake knows, but
    their note is an input: a new one makes the job run again, once."""
    return Path(manifest).with_suffix(".lost")


def note_lost_cells():
    """Write the note of each manifest with lost cells, or that cannot be read, unless one waits for its job already."""
    for manifest in [Path(each) for dataset in DATASETS for each in manifests(dataset) if Path(each).is_file()]:
        try:
            lost = [cell for cell in json.loads(manifest.read_bytes()) if not (manifest.parent / cell).is_file()]
        except (ValueError, TypeError, RecursionError):
            lost = ["the manifest itself, which cannot be read"]
        note = lost_file(manifest)
        noted = note.is_file() and note.stat().st_mtime > manifest.stat().st_mtime
        if lost and not noted:
            write_text(note, "\n".join([f"lost, seen {time.ctime()}", *lost, ""]))


def lost_cells(wildcards):
    note = lost_file("results/{dataset}/samples/{method}/{first}-{last}.json".format(**wildcards))
    return [str(note)] if note.is_file() else []


if workflow.is_main_process:
    note_lost_cells()


def results_of(dataset):
    table = [f"results/{dataset}/geometry.csv"] if DATASETS[dataset]["geometry"] else []
    return [f"results/{dataset}/table.csv", *table, f"results/{dataset}/plots"]


def pretrained_of(dataset):
    made = [f"results/{dataset}/pretrained/base.safetensors"]
    if DATASETS[dataset]["features"]["kind"] == "digits-cnn":
        made.append(f"results/{dataset}/pretrained/features.safetensors")
    return made


def warp_settings(wildcards):
    """The warp's own settings, with the number of steps of its budget where it is learned per budget."""
    warp = dict(DATASETS[wildcards.dataset]["warps"][wildcards.warp])
    if nfe := getattr(wildcards, "nfe", None):
        warp["steps"] = int(nfe) // 2
    return as_json({key: value for key, value in warp.items() if key not in ("network", "path")})


def sample_inputs(wildcards, nfes):
    method = DATASETS[wildcards.dataset]["methods"][wildcards.method]
    return {
        "network": network_file(wildcards.dataset, method["network"]),
        "path": path_file(wildcards.dataset, method["path"]),
        "grids": grid_files(wildcards.dataset, wildcards.method, nfes),
    }


def plotted_paths(dataset):
    """Paths whose levels are shown: those of the methods, each once."""
    return list(dict.fromkeys(method["path"] for method in DATASETS[dataset]["methods"].values()))


def plot_settings(wildcards):
    """Names and files of what the figures show."""
    dataset = wildcards.dataset
    warps = DATASETS[dataset]["warps"]
    return json.dumps(
        {
            "dataset": dataset,
            "sigma_max": DATASETS[dataset]["sigma_max"],
            "methods": {
                name: [method["path"], method["solver"]] for name, method in DATASETS[dataset]["methods"].items()
            },
            "ladder": DATASETS[dataset]["ladder"],
            "paths": {name: path_file(dataset, name) for name in plotted_paths(dataset)},
            "warps": {
                name: [f"results/{dataset}/warps/{name}.safetensors", warps[name]["path"]]
                for name in warps
                if warps[name]["steps"] != "per_nfe"
            },
            "strips": strip_files(dataset),
            "geometry": geometry_files(dataset),
            "convergence": {
                name: f"results/{dataset}/convergence/{name}-nfe{nfe}.csv"
                for name, nfe in DATASETS[dataset]["convergence"].items()
            },
            "published": {"file": PUBLISHED, "methods": DATASETS[dataset]["plots"]["published"]},
            "grid_nfe": grid_nfe(DATASETS[dataset]),
            "reference": f"results/{dataset}/reference.safetensors",
            "samples": f"results/{dataset}/samples",
        }
    )


def search_files(dataset):
    return {
        name: f"results/{dataset}/searches/{name}.safetensors"
        for name in sorted(planning.needed(DATASETS[dataset])["searches"])
    }


def geometry_files(dataset):
    return {name: f"results/{dataset}/geometry/{name}.safetensors" for name in DATASETS[dataset]["geometry"]}


def strip_files(dataset):
    nfe = grid_nfe(DATASETS[dataset])
    return {
        name: f"results/{dataset}/trajectories/{name}-nfe{nfe}.safetensors" for name in strip_methods(DATASETS[dataset])
    }


def plot_inputs(wildcards):
    settings = json.loads(plot_settings(wildcards))
    return [
        settings["reference"],
        *manifests(wildcards.dataset),
        *settings["paths"].values(),
        *(file for file, _ in settings["warps"].values()),
        *settings["strips"].values(),
        *settings["geometry"].values(),
        *settings["convergence"].values(),
        *([PUBLISHED] if settings["published"]["methods"] else []),
    ]


def download_options(wildcards):
    """Address, hash, lock file and mirror of a fetched file."""
    known = FETCHED[f"results/fetched/{wildcards.file}"]
    options = known | {"lock": "config/lock.json", "mirror": CONFIG["mirror"]}
    given = [each for name, value in options.items() if value is not None for each in option(name, value)]
    return [*given, *(["--offline"] if CONFIG["offline"] else [])]
