# needs: feature statistics, paths, trajectories.   makes: distances, tables, figures.   next: the reader


rule distance:
    """Frechet distance of every cell of a dataset, in one job: importing clean-fid takes longer than a distance."""
    input:
        reference=RESULTS + "/reference.safetensors",
        manifests=lambda wildcards: manifests(wildcards.dataset),
    output:
        RESULTS + "/distances.csv",
    log:
        RESULTS + "/logs/distance.log",
    params:
        images=lambda wildcards: DATASETS[wildcards.dataset]["sampling"]["images"],
        kind=lambda wildcards: DATASETS[wildcards.dataset]["features"]["kind"],
    conda:
        ENVIRONMENT
    shell:
        "exec python -m anisodiff distance --dataset {wildcards.dataset} --reference {input.reference:q}"
        " --images {params.images} --features-kind {params.kind} --output {output:q} {input.manifests:q} >{log} 2>&1"


rule table:
    """The table: tidy CSV, and method by NFE as Markdown and LaTeX."""
    input:
        RESULTS + "/distances.csv",
    output:
        csv=report(RESULTS + "/table.csv", category="{dataset}", caption="../report/table.rst"),
        md=RESULTS + "/table.md",
        tex=RESULTS + "/table.tex",
    log:
        RESULTS + "/logs/table.log",
    params:
        # a list, so that the order of the rows is the configuration's
        methods=lambda wildcards: json.dumps(DATASETS[wildcards.dataset]["methods"]),
        folder=subpath(output.csv, parent=True),
    conda:
        ENVIRONMENT
    shell:
        "exec python -m anisodiff table --distances {input:q} --methods {params.methods:q} --output {params.folder:q}"
        " >{log} 2>&1"


def plotted_paths(dataset):
    """Paths whose levels are shown: those of the methods, each once."""
    return list(dict.fromkeys(method["path"] for method in DATASETS[dataset]["methods"].values()))


def grid_nfe(dataset):
    return DATASETS[dataset]["plots"]["grid_nfe"] or min(DATASETS[dataset]["sampling"]["nfe"])


def plot_settings(wildcards):
    """Names and files of what the figures show."""
    dataset = wildcards.dataset
    warps = DATASETS[dataset]["warps"]
    return as_json(
        {
            "dataset": dataset,
            "sigma_max": DATASETS[dataset]["sigma_max"],
            "methods": list(DATASETS[dataset]["methods"]),
            "paths": {name: path_file(dataset, name) for name in plotted_paths(dataset)},
            "warps": {
                name: [f"results/{dataset}/warps/{name}.safetensors", warps[name]["path"]]
                for name in warps
                if warps[name]["steps"] != "per_nfe"
            },
            "strips": strip_files(dataset),
            "grid_nfe": grid_nfe(dataset),
            "reference": f"results/{dataset}/reference.safetensors",
            "samples": f"results/{dataset}/samples",
        }
    )


def strip_files(dataset):
    names = DATASETS[dataset]["plots"]["strip_methods"]
    return {name: f"results/{dataset}/trajectories/{name}-nfe{grid_nfe(dataset)}.safetensors" for name in names}


def plot_inputs(wildcards):
    settings = json.loads(plot_settings(wildcards))
    return [
        settings["reference"],
        *manifests(wildcards.dataset),
        *settings["paths"].values(),
        *(file for file, _ in settings["warps"].values()),
        *settings["strips"].values(),
    ]


rule plots:
    """Every figure of a dataset, SVG and PNG."""
    input:
        plot_inputs,
        table=RESULTS + "/table.csv",
    output:
        report(
            directory(RESULTS + "/plots"), patterns=["{figure}.svg"], category="{dataset}", caption="../report/figure.rst"
        ),
    log:
        RESULTS + "/logs/plots.log",
    params:
        settings=plot_settings,
    conda:
        ENVIRONMENT
    shell:
        "exec python -m anisodiff plot --table {input.table:q} --settings {params.settings:q} --output {output:q}"
        " >{log} 2>&1"
