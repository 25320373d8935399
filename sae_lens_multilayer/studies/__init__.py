"""Studies: questions that take several runs, each with its tables, figures and page.

`STUDIES` names the modules of this package that the command `study` runs. Each has
`run_settings(settings, folder)`, which takes the names and values of a YAML file,
resumes what an earlier call began in the folder, and returns tables to print.
"""

STUDIES = {
    "synthetic": "Recovery of known features of synthetic residual streams.",
    "comparison": "MLSAE against other ways to see all layers, matched in cost.",
    "paper": "The paper's tables, figures and claims for a chosen model and sizes.",
    "interventions": "Whether the layers of latents are those at which they matter.",
    "circuits": "Which nodes a task needs, and how faithful circuits of them are.",
    "token_dependence": "What the layers of latents depend on, with nulls.",
}
"""Modules and what they answer."""
