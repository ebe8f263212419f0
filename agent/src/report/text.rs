//! Reports for people: one line per control, and under what is not met what is expected, what was
//! seen and what to do.

use std::fmt::Write as _;

use super::{Overall, Report};
use crate::control::Verdict;
use crate::engine::{Outcome, StepResult};

/// The text form of a report.
#[must_use]
pub fn render(report: &Report) -> String {
    let mut out = String::new();
    let width = report.controls.iter().map(|o| o.about.id.len()).max().unwrap_or(0);
    for outcome in &report.controls {
        control(&mut out, outcome, width, report.command == "plan");
    }
    out.push('\n');
    out.push_str(&summary(report));
    out.push('\n');
    out
}

fn control(out: &mut String, outcome: &Outcome, width: usize, plan: bool) {
    let word = match outcome.verdict {
        Verdict::Pass { .. } => "PASS",
        Verdict::Fail { .. } => "FAIL",
        Verdict::Unknown { .. } => "UNKNOWN",
        Verdict::NotApplicable { .. } => "N/A",
    };
    // Writing to a String cannot fail.
    _ = writeln!(out, "{word:<8} {:<width$}  {}", outcome.about.id, outcome.verdict.sentence());
    let mut detail = |name: &str, text: &str| _ = writeln!(out, "         {name:<9} {text}");
    if let Verdict::Fail { expected, remedy, .. } = &outcome.verdict {
        detail("expected", expected);
        if outcome.refusal.is_none() && !plan {
            detail("remedy", remedy);
        }
    }
    for applied in &outcome.steps {
        match &applied.result {
            StepResult::Planned => detail("would", &applied.text),
            StepResult::Done => detail("did", &applied.text),
            StepResult::Failed(why) => detail("failed", &format!("{}: {why}", applied.text)),
        }
    }
    if let Some(why) = &outcome.refusal {
        detail("refused", why);
        if let Verdict::Fail { remedy, .. } = &outcome.verdict {
            detail("remedy", remedy);
        }
    }
}

/// The last line: whether all is well, and what is not.
#[must_use]
pub fn summary(report: &Report) -> String {
    let total = report.controls.len();
    let count = |word: &str| report.controls.iter().filter(|o| o.verdict.word() == word).count();
    let (failed, unknown) = (count("fail"), count("unknown"));
    let mut line = match report.result {
        Overall::Pass => format!("all {total} controls are met"),
        Overall::Fail | Overall::Unknown => {
            format!("{failed} of {total} controls failed, {unknown} could not be judged")
        }
    };
    if let Some(conclusion) = &report.conclusion {
        line = match (&conclusion.trouble, conclusion.ready) {
            (_, true) => format!("ready: {line}"),
            (Some(trouble), false) => format!("not ready: {line}, but {trouble}"),
            (None, false) => format!("not ready: {line}"),
        };
    }
    if !report.complete {
        line.push_str(" (a selection of the controls, which cannot make a host ready)");
    }
    if report.command == "plan" {
        let steps: usize = report.controls.iter().map(|o| o.steps.len()).sum();
        _ = write!(line, "; {steps} steps to do");
    }
    line
}
