//! What dockerd is told on its command line: on Debian, its unit has `$DOCKER_OPTS` from
//! `/etc/default/docker` there.

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
const SHORT: [(&str, &str); 5] =
    [("H", "host"), ("b", "bridge"), ("G", "group"), ("g", "graph"), ("l", "log-level")];

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

/// Short names of flags that need no value, so that others may follow in the same word: `-DH tcp://…`.
const SWITCHES: [(char, &str); 3] = [('D', "debug"), ('h', "help"), ('v', "version")];

/// The flags among the words of a command line, of which the first is the program.
#[must_use]
pub fn parse(words: &[String]) -> Vec<Flag> {
    let mut flags = Vec::new();
    let mut words = words.iter().skip(1).peekable();
    while let Some(word) = words.next() {
        let (name, value) = if let Some(long) = word.strip_prefix("--") {
            long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)))
        } else if let Some(short) = word.strip_prefix('-') {
            let short = switches(short, &mut flags);
            // `-Hfd://`, `-H=fd://`, `-H fd://`
            let end = short.chars().next().map_or(0, char::len_utf8);
            let (name, value) = short.split_at(end);
            (name, Some(value.strip_prefix('=').unwrap_or(value)).filter(|v| !v.is_empty()))
        } else {
            continue;
        };
        if name.is_empty() {
            continue;
        }
        let name = SHORT.iter().find(|(short, _)| *short == name).map_or(name, |(_, long)| long);
        let next = || words.next_if(|next| !next.starts_with('-')).cloned();
        let value = value.map(str::to_owned).or_else(next).unwrap_or_default();
        flags.push(Flag { name: name.to_owned(), value });
    }
    flags
}

/// Takes the switches off the beginning of short flags, and says what is left (pflag,
/// `parseSingleShortArg`).
fn switches<'a>(mut short: &'a str, flags: &mut Vec<Flag>) -> &'a str {
    while let Some(first) = short.chars().next()
        && let Some((_, name)) = SWITCHES.iter().find(|(switch, _)| *switch == first)
    {
        let rest = &short[first.len_utf8()..];
        let (value, rest) = match rest.strip_prefix('=') {
            Some(value) => (value, ""),
            None => ("", rest),
        };
        flags.push(Flag { name: (*name).to_owned(), value: value.to_owned() });
        short = rest;
    }
    short
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
            ("dockerd -DH tcp://0.0.0.0:2375", vec![("debug", ""), ("host", "tcp://0.0.0.0:2375")]),
            ("dockerd -DHtcp://:1", vec![("debug", ""), ("host", "tcp://:1")]),
            ("dockerd -D=false -DDg /srv", {
                vec![("debug", "false"), ("debug", ""), ("debug", ""), ("graph", "/srv")]
            }),
            // What follows a switch is not its value.
            ("dockerd -D x -H :1", vec![("debug", ""), ("host", ":1")]),
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
}
