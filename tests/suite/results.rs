//! `docs/results.md` is made from `recipes/measured/runs.toml`.
//!
//! `UPDATE_RESULTS=1 cargo test --test suite results` rewrites it.

use selfsup::recipes::{MeasuredRun, measured_runs};

const HEAD: &str = "\
# Results

Every figure that was measured here, from `recipes/measured/runs.toml`. A figure that predates a fix that may have changed it is
struck through, not deleted; it stays so until it is measured again. The commit is the program's, or that of the log if the
program's was not noted. What no run has shown yet is at the end.
";

const OPEN: &str = "
## Not measured yet

- None of the published recipes, at their full length: they need a GPU. Their figures in `selfsup recipes` are those of the
  sources, not of this program.
- Six of the eight recipes of half an hour on two cores (those that end in `-cifar10-cpu`, but SimCLR's and MoCo v2's):
  `scripts/half-hours CIFAR10` runs them and goes on where it stopped.
";

fn row(run: &MeasuredRun) -> String {
    let MeasuredRun { recipe, what, figure, command, commit, date, machine, log, predates } = run;
    let figure = match predates {
        Some(fix) => format!("~~{figure}~~ predates {fix}"),
        None => figure.clone(),
    };
    let recipe = recipe.as_ref().map_or(String::new(), |name| format!("`{name}`"));
    let log = if log.starts_with("docs/") { log.clone() } else { format!("[{log}](../{log})") };
    format!(
        "| {recipe} | {what} | {figure} | `{command}` | {commit} | {date} | {machine} | {log} |\n"
    )
}

fn page() -> String {
    let (of_recipes, others): (Vec<_>, Vec<_>) =
        measured_runs().into_iter().partition(|run| run.recipe.is_some());
    let mut page = HEAD.to_owned();
    for (title, runs) in [("What runs learnt", of_recipes), ("Speed and exactness", others)] {
        page += &format!("\n## {title}\n\n");
        page += "| recipe | what | figure | command | commit | date | machine | log |\n";
        page += "|---|---|---|---|---|---|---|---|\n";
        page.extend(runs.iter().map(row));
    }
    page + OPEN
}

#[test]
fn the_page_of_results_shows_every_measured_run() {
    let (path, page) = ("docs/results.md", page());
    if std::env::var_os("UPDATE_RESULTS").is_some() {
        std::fs::write(path, &page).unwrap();
    }
    let found = std::fs::read_to_string(path).unwrap_or_default();
    assert!(found == page, "{path} is not that of recipes/measured/runs.toml: UPDATE_RESULTS=1");
}
