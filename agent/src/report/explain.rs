//! One control in full, for people: why it exists, each fact with its source and time, what the facts
//! mean and what to do. Facts are shown as they are kept: nothing is left out here.

use std::fmt::Write as _;

use serde_json::Value;

use super::Report;
use crate::control::Verdict;
use crate::engine::Outcome;

/// The text form of a report of one control.
#[must_use]
pub fn render(report: &Report) -> String {
    report.controls.iter().map(one).collect()
}

fn one(outcome: &Outcome) -> String {
    let about = outcome.about;
    let mut out = String::new();
    // Writing to a String cannot fail.
    _ = writeln!(out, "{}: {}\n\n{}", about.id, about.title, about.why);
    if !about.requires.is_empty() {
        _ = writeln!(out, "\nIt can be judged when these are met: {}", about.requires.join(", "));
    }
    if let Value::Object(facts) = &outcome.facts {
        out.push_str("\nFacts\n");
        for (name, fact) in facts {
            out.push_str(&self::fact(name, fact));
        }
    }
    _ = writeln!(out, "\nVerdict: {}", outcome.verdict.word());
    let mut detail = |name: &str, text: &str| _ = writeln!(out, "  {name:<9} {text}");
    match &outcome.verdict {
        Verdict::Fail { expected, observed, remedy } => {
            detail("expected", expected);
            detail("observed", observed);
            if let Some(why) = &outcome.refusal {
                detail("refused", why);
            }
            detail("remedy", remedy);
        }
        verdict => detail("observed", verdict.sentence()),
    }
    out
}

/// A fact with its source and time, and its value below; or a structure of facts.
fn fact(name: &str, fact: &Value) -> String {
    let name = name.replace('_', " ");
    let Some((source, at)) = fact["source"].as_str().zip(fact["at"].as_str()) else {
        return format!("  {name}\n{}", value(fact, 4));
    };
    // To the second: a fraction tells nobody anything.
    let at = at.split_once('.').map_or_else(|| at.to_owned(), |(seconds, _)| format!("{seconds}Z"));
    let head = format!("  {name} ({source}, {at})");
    match (fact.get("value"), fact["unknown"].as_str()) {
        (_, Some(why)) => format!("{head}\n    unknown: {why}\n"),
        // A chain is told best by its own lines.
        (Some(chain), _) if chain["path"].is_array() => {
            format!("{head}\n{}", value(&chain["path"], 4))
        }
        (seen, _) => format!("{head}\n{}", value(seen.unwrap_or(&Value::Null), 4)),
    }
}

/// A value as indented lines.
fn value(seen: &Value, indent: usize) -> String {
    let pad = " ".repeat(indent);
    match seen {
        Value::Null => format!("{pad}none\n"),
        Value::String(text) if text.is_empty() => format!("{pad}empty\n"),
        Value::String(text) => {
            text.lines().fold(String::new(), |out, line| format!("{out}{pad}{line}\n"))
        }
        Value::Bool(_) | Value::Number(_) => format!("{pad}{seen}\n"),
        Value::Array(list) if list.is_empty() => format!("{pad}none\n"),
        Value::Array(list) => list
            .iter()
            .map(|item| match item {
                // The first line after a dash, the others below it.
                Value::Object(_) | Value::Array(_) => {
                    let text = value(item, indent + 2);
                    format!("{pad}- {}", text.trim_start())
                }
                _ => value(item, indent),
            })
            .collect(),
        Value::Object(map) if map.contains_key("source") && map.contains_key("at") => {
            // A fact within a structure.
            let seen = map.get("value").or(map.get("unknown")).unwrap_or(&Value::Null);
            value(seen, indent)
        }
        Value::Object(map) if map.is_empty() => format!("{pad}none\n"),
        Value::Object(map) => map
            .iter()
            .map(|(key, item)| {
                let text = value(item, indent + 2);
                let key = key.replace('_', " ");
                // A single short line stands beside its key.
                match text.trim().lines().collect::<Vec<_>>()[..] {
                    [line] if !item.is_array() => format!("{pad}{key}: {line}\n"),
                    _ => format!("{pad}{key}:\n{text}"),
                }
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_fact_shows_its_source_time_and_value() {
        let seen = json!({
            "source": "/sys/block", "at": "2026-11-22T03:01:29.5Z",
            "value": [{ "name": "nvme1n1", "size": 8, "serial": null, "tags": {} }],
        });
        assert_eq!(
            fact("the_disks", &seen),
            "  the disks (/sys/block, 2026-11-22T03:01:29Z)\n    - name: nvme1n1\n      \
             serial: none\n      size: 8\n      tags: none\n"
        );
        let unknown = json!({ "source": "EC2", "at": "2026-11-22T03:01:29Z", "unknown": "denied" });
        assert_eq!(fact("x", &unknown), "  x (EC2, 2026-11-22T03:01:29Z)\n    unknown: denied\n");
        let chain = json!({
            "source": "s", "at": "2026-11-22T03:01:29Z",
            "value": { "path": ["/data: ext4", "  nvme1n1"], "device": { "name": "nvme1n1" } },
        });
        assert_eq!(
            fact("chain", &chain),
            "  chain (s, 2026-11-22T03:01:29Z)\n    /data: ext4\n      nvme1n1\n"
        );
    }
}
