//! The logs of containers have a limit.

use serde_json::Value;

use super::{Cure, OPTIONS, Seen, Wrong, set};
use crate::control::Unknown;

const DRIVER: &str = "log-driver";

/// What is written where a container's log has no limit. Docker's own `local` driver keeps 5 x 20 MB.
const LOG_LIMITS: [(&str, &str); 2] = [("max-size", "10m"), ("max-file", "5")];

pub(super) fn logs(seen: &Seen) -> Result<Option<Wrong>, Unknown> {
    if let Some(wrong) = seen.twice(DRIVER, DRIVER).or_else(|| seen.twice("log-opt", OPTIONS)) {
        return Ok(Some(wrong));
    }
    let asked = seen.asked_text(DRIVER)?.unwrap_or_else(|| "json-file".to_owned());
    if let Some(driver) = seen.told(DRIVER, |f| f.log_driver.clone())?
        && driver != asked
    {
        let what = format!("the log driver is {driver}, and {asked} at Docker's next start");
        return Ok(Some(Wrong { seen: what, cure: seen.renewal()? }));
    }
    // What other drivers keep is not Docker's, and `local` has limits of its own.
    let own = asked == "local";
    if !own && asked != "json-file" {
        return Ok(None);
    }
    let mut missing = Vec::new();
    for (name, value) in LOG_LIMITS {
        let limit = log_option(seen, name)?;
        let fits = match (&limit, name) {
            (None, _) => own,
            (Some(limit), "max-size") => is_size(limit),
            (Some(limit), _) => limit.parse().is_ok_and(|count: u32| count > 0),
        };
        if !fits {
            missing.push((name, value));
        }
    }
    if missing.is_empty() {
        return seen.untold(OPTIONS);
    }
    let names = missing.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" and ");
    let what = format!("the log of a container ({asked}) has no limit: no {names}");
    let cure = if seen.flag("log-opt").is_some() {
        let flags = missing.iter().map(|(name, value)| format!("--log-opt {name}={value}"));
        Cure::Operator(format!(
            "add {} to dockerd's command line, where other --log-opt are",
            flags.collect::<Vec<_>>().join(" ")
        ))
    } else {
        let keys = missing.iter().map(|(name, value)| set(format!("{OPTIONS}.{name}"), *value));
        Cure::Set(keys.collect())
    };
    Ok(Some(Wrong { seen: what, cure }))
}

fn log_option(seen: &Seen, name: &str) -> Result<Option<String>, Unknown> {
    let flags = seen.flags.iter().filter(|flag| flag.name == "log-opt");
    let mut given = flags.filter_map(|flag| flag.value.strip_prefix(name)?.strip_prefix('='));
    if let Some(value) = given.next_back() {
        return Ok(Some(value.to_owned()));
    }
    match seen.key(OPTIONS).map(|options| options.get(name).unwrap_or(&Value::Null)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(value) => Err(Unknown(format!("{} sets {name} to {value}", seen.path()))),
    }
}

/// A size above 0, such as `10m` (github.com/docker/go-units).
fn is_size(text: &str) -> bool {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let known = ["", "b", "k", "kb", "kib", "m", "mb", "mib", "g", "gb", "gib", "t", "tb", "tib"];
    known.contains(&unit.as_str()) && number.parse().is_ok_and(|size: f64| size > 0.0)
}
