//! What dockerd is told on its command line.
//!
//! The running daemon's is in `/proc`; that of the next start is in its unit, with what systemd puts
//! in for variables (systemd.service(5), "Command lines"): Debian's has `$DOCKER_OPTS` from
//! `/etc/default/docker`.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

/// A flag that is set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flag {
    /// Its long name, without the dashes.
    pub name: String,
    /// Its value; empty for one that needs none.
    pub value: String,
}

/// Short names (moby, cmd/dockerd and daemon/command/options.go).
const SHORT: [(&str, &str); 6] = [
    ("H", "host"),
    ("b", "bridge"),
    ("D", "debug"),
    ("G", "group"),
    ("g", "graph"),
    ("l", "log-level"),
];

/// The flags that are kept: of the others, such as most of `--log-opt`, the value may be a secret.
const KEPT: [&str; 13] = [
    "bridge",
    "config-file",
    "data-root",
    "graph",
    "host",
    "icc",
    "live-restore",
    "log-driver",
    "no-new-privileges",
    "seccomp-profile",
    "tls",
    "tlsverify",
    "userland-proxy",
];

/// Of `--log-opt`, what says how large a log becomes.
const KEPT_OPTIONS: [&str; 2] = ["max-file=", "max-size="];

/// The words of the command line of a process.
pub fn words_of_process(pid: u32) -> Result<Vec<String>> {
    let path = format!("/proc/{pid}/cmdline");
    let bytes = fs::read(&path).with_context(|| format!("reading {path}"))?;
    let text = String::from_utf8_lossy(&bytes);
    // A process that is gone, or is about to be, has none.
    ensure!(!text.is_empty(), "{path} is empty");
    Ok(text.trim_end_matches('\0').split('\0').map(str::to_owned).collect())
}

/// The flags among the words of a command line, of which the first is the program.
#[must_use]
pub fn parse(words: &[String]) -> Vec<Flag> {
    let mut flags = Vec::new();
    let mut words = words.iter().skip(1).peekable();
    while let Some(word) = words.next() {
        let (name, value) = if let Some(long) = word.strip_prefix("--") {
            long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)))
        } else if let Some(short) = word.strip_prefix('-') {
            // `-Hfd://`, `-H=fd://`, `-H fd://`
            let end = short.chars().next().map_or(0, char::len_utf8);
            let (name, value) = short.split_at(end);
            (name, Some(value.strip_prefix('=').unwrap_or(value)).filter(|v| !v.is_empty()))
        } else {
            continue;
        };
        let name = SHORT.iter().find(|(short, _)| *short == name).map_or(name, |(_, long)| long);
        let next = || words.next_if(|next| !next.starts_with('-')).cloned();
        let value = value.map(str::to_owned).or_else(next).unwrap_or_default();
        if !name.is_empty() {
            flags.push(Flag { name: name.to_owned(), value });
        }
    }
    flags
}

/// The flags that may be shown.
#[must_use]
pub fn kept(flags: Vec<Flag>) -> Vec<Flag> {
    let shown = |flag: Flag| match flag.name.as_str() {
        "log-opt" if !KEPT_OPTIONS.iter().any(|option| flag.value.starts_with(option)) => {
            // That there is one counts: the same may not be in the file then.
            Some(Flag { value: "…".into(), ..flag })
        }
        "log-opt" => Some(flag),
        name => KEPT.contains(&name).then_some(flag),
    };
    flags.into_iter().filter_map(shown).collect()
}

/// The words of a unit's command line, with its variables.
#[must_use]
pub fn expand(argv: &[String], variables: &BTreeMap<String, String>) -> Vec<String> {
    let mut words = Vec::new();
    for word in argv {
        match word.strip_prefix('$').filter(|name| is_name(name)) {
            // A variable of its own is split at white space; one that is not set is no word.
            Some(name) => words.extend(split(variables.get(name).map_or("", String::as_str))),
            None => words.push(within(word, variables)),
        }
    }
    words
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// A word with `${NAME}` in it.
fn within(word: &str, variables: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    let mut rest = word;
    while let Some((before, after)) = rest.split_once("${") {
        let Some((name, behind)) = after.split_once('}') else { break };
        out += before;
        out += variables.get(name).map_or("", String::as_str);
        rest = behind;
    }
    out + rest
}

/// A text at its white space, outside of quotes.
fn split(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in text.chars() {
        match quote {
            Some(q) if c == q => quote = None,
            None if c == '"' || c == '\'' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

/// The variables of an `EnvironmentFile=`.
#[must_use]
pub fn variables(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    // A backslash at the end goes on with the next line.
    for line in text.replace("\\\n", " ").lines().map(str::trim) {
        if line.starts_with(['#', ';']) {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else { continue };
        let value = value.trim();
        let inner = ['"', '\'']
            .iter()
            .find_map(|q| value.strip_prefix(*q).and_then(|value| value.strip_suffix(*q)));
        found.push((name.trim().to_owned(), inner.unwrap_or(value).to_owned()));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn every_way_to_write_a_flag_is_read() {
        let table = [
            ("dockerd", vec![]),
            (
                "dockerd -H fd:// --containerd=/run/c.sock",
                vec![("host", "fd://"), ("containerd", "/run/c.sock")],
            ),
            ("dockerd -Hfd:// -H=tcp://:2375", vec![("host", "fd://"), ("host", "tcp://:2375")]),
            ("dockerd --host tcp://0.0.0.0:2375", vec![("host", "tcp://0.0.0.0:2375")]),
            ("dockerd --live-restore --icc=false", vec![("live-restore", ""), ("icc", "false")]),
            ("dockerd -D -l warn", vec![("debug", ""), ("log-level", "warn")]),
            ("dockerd --log-opt max-size=1m", vec![("log-opt", "max-size=1m")]),
            ("dockerd - x --", vec![]),
        ];
        for (line, expected) in table {
            let flags = parse(&words(line));
            let seen: Vec<_> = flags.iter().map(|f| (f.name.as_str(), f.value.as_str())).collect();
            assert_eq!(seen, expected, "{line}");
        }
    }

    #[test]
    fn no_secret_is_kept() {
        let line = "dockerd --log-opt splunk-token=secret --log-opt max-size=1m --label a=secret \
                    --icc=false --http-proxy http://u:secret@p";
        let kept = kept(parse(&words(line)));
        let seen: Vec<_> = kept.iter().map(|f| (f.name.as_str(), f.value.as_str())).collect();
        assert_eq!(seen, [("log-opt", "…"), ("log-opt", "max-size=1m"), ("icc", "false")]);
    }

    #[test]
    fn the_units_variables_are_put_in_as_systemd_does() {
        let text = "# comment\nDOCKER_OPTS=\"-H tcp://:2375 --label 'a b'\"\nEMPTY=\nDIR='/x y'\n\
                    LONG=--icc=false \\\n --debug\nnonsense\n";
        let variables: BTreeMap<_, _> = variables(text).into_iter().collect();
        let argv =
            ["dockerd", "$DOCKER_OPTS", "$EMPTY", "$UNSET", "--data-root=${DIR}/d", "$LONG", "${"];
        let seen = expand(&argv.map(str::to_owned), &variables);
        let expected = [
            "dockerd",
            "-H",
            "tcp://:2375",
            "--label",
            "a b",
            "--data-root=/x y/d",
            "--icc=false",
            "--debug",
            "${",
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn the_command_line_of_a_process_is_read() {
        assert!(!words_of_process(std::process::id()).unwrap()[0].is_empty());
        assert!(words_of_process(u32::MAX).is_err());
    }
}
