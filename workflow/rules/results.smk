# needs: feature statistics, paths, trajectories.   makes: distances, tables, figures.   next: the reader


rule distance:
    """Frechet distance of every cell of a dataset, in one job: the root of the reference covariance is taken once."""
    input:
        reference="results/{dataset}/reference.safetensors",
        manifests=lambda wildcards: manifests(wildcards.dataset),
    output:
        "results/{dataset}/distances.csv",
    log:
        "results/{dataset}/logs/distance.log",
    conda:
        ENVIRONMENT
    resources:
        **asks("distance"),
    params:
        images=lambda wildcards: DATASETS[wildcards.dataset]["sampling"]["images"],
        kind=lambda wildcards: DATASETS[wildcards.dataset]["features"]["kind"],
    shell:
        "exec python -m anisodiff distance --dataset {wildcards.dataset:q} --reference {input.reference:q}"
        " --images {params.images} --features-kind {params.kind:q} --output {output:q} {input.manifests:q} >{log:q} 2>&1"


rule table:
    """The table: tidy CSV, and method by NFE as Markdown and LaTeX; and what it cost."""
    input:
        lambda wildcards: search_files(wildcards.dataset).values(),
        distances="results/{dataset}/distances.csv",
    output:
        csv="results/{dataset}/table.csv",
        md="results/{dataset}/table.md",
        tex="results/{dataset}/table.tex",
        cost="results/{dataset}/cost.csv",
        cost_md="results/{dataset}/cost.md",
    log:
        "results/{dataset}/logs/table.log",
    conda:
        ENVIRONMENT
    params:
        # a list, so that the order of the rows is the configuration's
        methods=lambda wildcards: json.dumps(DATASETS[wildcards.dataset]["methods"]),
        ladder=lambda wildcards: option("ladder", DATASETS[wildcards.dataset]["ladder"]),
        searches=lambda wildcards: json.dumps(search_files(wildcards.dataset)),
        folder=subpath(output.csv, parent=True),
    shell:
        "exec python -m anisodiff table --distances {input.distances:q} --methods {params.methods:q} --output {params.folder:q}"
        " {params.ladder:q} --searches {params.searches:q}"
        " >{log:q} 2>&1"


rule plots:
    """Every figure of a dataset, SVG and PNG."""
    input:
        plot_inputs,
        table="results/{dataset}/table.csv",
    output:
        directory("results/{dataset}/plots"),
    log:
        "results/{dataset}/logs/plots.log",
    conda:
        ENVIRONMENT
    params:
        settings=plot_settings,
    shell:
        "exec python -m anisodiff plot --table {input.table:q} --settings {params.settings:q} --output {output:q}"
        " >{log:q} 2>&1"


rule publish:
    """Tables and figures, copied to where they can be committed, with what made them."""
    input:
        lambda wildcards: results_of(wildcards.dataset),
    output:
        "results/reference/{dataset}/provenance.json",
    log:
        "results/{dataset}/logs/publish.log",
    conda:
        ENVIRONMENT
    params:
        settings=lambda wildcards: json.dumps(DATASETS[wildcards.dataset]),
        results="results/{dataset}",
        output=subpath(output[0], parent=True),
    shell:
        "exec python -m anisodiff publish --results {params.results:q} --settings {params.settings:q}"
        " --output {params.output:q} >{log:q} 2>&1"
