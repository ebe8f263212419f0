//! What is asked of Docker, each with the item of the CIS Docker Benchmark (1.6.0) that asks for it.

use jiff::Timestamp;
use serde_json::Value;

use crate::control::Unknown;
use crate::host::dockerd::flags::Flag;
use crate::host::dockerd::json::Setting;
use crate::host::dockerd::{Door, Written};
use crate::host::engine_api::{Bridge, InForce};

mod logs;

use logs::logs;

pub(super) const LIVE_RESTORE: &str = "live-restore";
const NO_NEW_PRIVILEGES: &str = "no-new-privileges";
const USERLAND_PROXY: &str = "userland-proxy";
const ICC: &str = "icc";
const SECCOMP: &str = "seccomp-profile";
const OPTIONS: &str = "log-opts";

/// The daemon, as far as it is known.
pub(super) struct Seen<'a> {
    /// Whether it runs; otherwise it is judged as it would start.
    pub(super) runs: bool,
    pub(super) started: Option<Timestamp>,
    pub(super) flags: &'a [Flag],
    pub(super) file: &'a Written,
    pub(super) swarm: bool,
    /// Where its socket unit listens.
    pub(super) listen: &'a [String],
    pub(super) in_force: Option<&'a InForce>,
    pub(super) bridge: Option<&'a Bridge>,
    pub(super) doors: &'a [Door],
}

/// One thing that is asked for.
pub(super) struct Rule {
    /// The benchmark's item; none where it has none.
    item: Option<&'static str>,
    title: &'static str,
    /// The key in Docker's file that it is about, above all.
    key: &'static str,
    look: fn(&Seen) -> Result<Option<Wrong>, Unknown>,
}

/// Something that is not as it is asked for.
pub(super) struct Wrong {
    seen: String,
    cure: Cure,
}

/// What would put it right.
#[derive(Debug, PartialEq)]
pub(super) enum Cure {
    /// These keys in the file, and that Docker takes it up.
    Set(Vec<Setting>),
    /// That Docker takes up the file as it is.
    Renew,
    /// What only an operator can do.
    Operator(String),
}

/// A rule that is not met.
pub(super) struct Found {
    pub(super) rule: &'static Rule,
    seen: String,
    pub(super) cure: Cure,
}

static RULES: [Rule; 8] = [
    Rule {
        item: Some("2.7"),
        title: "Ensure TLS authentication for Docker daemon is configured",
        key: "hosts",
        look: tcp,
    },
    Rule {
        item: Some("2.2"),
        title: "Ensure network traffic is restricted between containers on the default bridge",
        key: ICC,
        look: icc,
    },
    Rule { item: None, title: "Logs of containers have a limit", key: OPTIONS, look: logs },
    Rule {
        item: Some("2.14"),
        title: "Ensure containers are restricted from acquiring new privileges",
        key: NO_NEW_PRIVILEGES,
        look: no_new_privileges,
    },
    Rule {
        item: Some("2.15"),
        title: "Ensure live restore is enabled",
        key: LIVE_RESTORE,
        look: live_restore,
    },
    Rule {
        item: Some("2.16"),
        title: "Ensure Userland Proxy is Disabled",
        key: USERLAND_PROXY,
        look: userland_proxy,
    },
    Rule {
        item: Some("5.22"),
        title: "Ensure the default seccomp profile is not Disabled",
        key: SECCOMP,
        look: seccomp,
    },
    Rule {
        item: Some("5.2"),
        title: "Ensure that, if applicable, an AppArmor Profile is enabled",
        key: "",
        look: apparmor,
    },
];

/// All that is not met, and why something could not be judged.
pub(super) fn look(seen: &Seen) -> (Vec<Found>, Vec<String>) {
    let (mut found, mut unclear) = (Vec::new(), Vec::new());
    for rule in &RULES {
        match (rule.look)(seen) {
            Ok(None) => {}
            Ok(Some(Wrong { seen, cure })) => found.push(Found { rule, seen, cure }),
            Err(Unknown(why)) => unclear.push(why),
        }
    }
    (found, unclear)
}

/// The same of the daemon that runs and of what its next start would make of it, where that differs.
pub(super) fn look_at_both(now: &Seen, next: Option<&Seen>) -> (Vec<Found>, Vec<String>) {
    let (mut found, mut unclear) = look(now);
    let (more, why) = next.map(look).unwrap_or_default();
    for one in more {
        if found.iter().all(|known| known.rule.title != one.rule.title) {
            let seen = format!("at Docker's next start, {}", one.seen);
            found.push(Found { seen, ..one });
        }
    }
    unclear.extend(why);
    (found, unclear)
}

impl Rule {
    pub(super) fn key(&self) -> &'static str {
        self.key
    }

    /// Its number and title.
    pub(super) fn name(&self) -> String {
        match self.item {
            Some(item) => format!("CIS {item} ({})", self.title),
            None => self.title.to_owned(),
        }
    }
}

impl Found {
    pub(super) fn text(&self) -> String {
        match self.rule.item {
            Some(item) => format!("{} (CIS {item})", self.seen),
            None => self.seen.clone(),
        }
    }

    /// What hostagent leaves to an operator.
    pub(super) fn refusal(&self) -> Option<String> {
        match &self.cure {
            Cure::Operator(what) => Some(format!("{}: {what}", self.seen)),
            Cure::Set(_) | Cure::Renew => None,
        }
    }
}

impl<'a> Seen<'a> {
    /// A daemon that is about to be started.
    pub(super) fn at_start(flags: &'a [Flag], file: &'a Written, swarm: bool) -> Self {
        Self {
            runs: false,
            started: None,
            flags,
            file,
            swarm,
            listen: &[],
            in_force: None,
            bridge: None,
            doors: &[],
        }
    }

    fn flag(&self, name: &str) -> Option<&str> {
        self.flags.iter().rev().find(|flag| flag.name == name).map(|flag| flag.value.as_str())
    }

    fn key(&self, name: &str) -> Option<&Value> {
        self.file.settings.get(name)
    }

    fn path(&self) -> std::path::Display<'_> {
        self.file.path.display()
    }

    /// What flag and file ask for.
    fn asked(&self, key: &str, default: bool) -> Result<bool, Unknown> {
        if let Some(value) = self.flag(key) {
            // As Go reads it.
            return match value {
                "" | "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
                "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
                _ => Err(Unknown(format!("--{key}={value} is not understood"))),
            };
        }
        match self.key(key) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(value) => Err(Unknown(format!("{} sets {key} to {value}", self.path()))),
        }
    }

    fn asked_text(&self, key: &str) -> Result<Option<String>, Unknown> {
        if let Some(value) = self.flag(key) {
            return Ok(Some(value.to_owned()));
        }
        match self.key(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(value) => Err(Unknown(format!("{} sets {key} to {value}", self.path()))),
        }
    }

    /// Docker does not start with the same as a flag and in its file.
    fn twice(&self, flag: &str, key: &str) -> Option<Wrong> {
        (self.flag(flag).is_some() && self.key(key).is_some()).then(|| Wrong {
            seen: format!("{key} is in {}, and --{flag} on dockerd's command line", self.path()),
            cure: Cure::Operator("Docker does not start with both: remove one".to_owned()),
        })
    }

    /// Of what the daemon says, one thing; none if it does not run.
    fn told<T>(
        &self,
        what: &str,
        of: impl Fn(&InForce) -> Option<T>,
    ) -> Result<Option<T>, Unknown> {
        let Some(in_force) = self.in_force.filter(|_| self.runs) else { return Ok(None) };
        match of(in_force) {
            Some(value) => Ok(Some(value)),
            None => Err(Unknown(format!("Docker does not say what {what} is"))),
        }
    }

    /// Whether the daemon that runs may have been started with another file.
    fn is_stale(&self) -> Result<bool, Unknown> {
        let (true, Some(changed)) = (self.runs, self.file.changed) else { return Ok(false) };
        match self.started {
            Some(started) => Ok(changed > started),
            None => Err(Unknown("systemd does not say when Docker was started".to_owned())),
        }
    }

    /// What helps where file and flags are right, and Docker says otherwise.
    fn renewal(&self) -> Result<Cure, Unknown> {
        Ok(if self.is_stale()? {
            Cure::Renew
        } else {
            Cure::Operator(
                "Docker was told, and does otherwise: see `journalctl -b -u docker.service`, and \
                 whether containers ran when it was started"
                    .to_owned(),
            )
        })
    }

    /// One that Docker does not tell: right in a file that Docker has read.
    fn untold(&self, key: &str) -> Result<Option<Wrong>, Unknown> {
        Ok(self.is_stale()?.then(|| Wrong {
            seen: format!(
                "{} has changed since Docker was started, which does not say what {key} it has",
                self.path()
            ),
            cure: Cure::Renew,
        }))
    }
}

fn set(key: impl Into<String>, value: impl Into<Value>) -> Setting {
    Setting { key: key.into(), value: Some(value.into()) }
}

/// A switch that flag and file do not set as wanted.
fn misset(
    seen: &Seen,
    key: &'static str,
    wanted: bool,
    default: bool,
) -> Result<Option<Wrong>, Unknown> {
    if let Some(wrong) = seen.twice(key, key) {
        return Ok(Some(wrong));
    }
    let asked = seen.asked(key, default)?;
    if asked == wanted {
        return Ok(None);
    }
    Ok(Some(match seen.flag(key) {
        Some(_) => Wrong {
            seen: format!("dockerd's command line sets {key} to {asked}"),
            cure: Cure::Operator(format!(
                "remove --{key} there (docker.service, /etc/default/docker), and restart Docker"
            )),
        },
        None => {
            Wrong { seen: format!("{key} is {asked}"), cure: Cure::Set(vec![set(key, wanted)]) }
        }
    }))
}

/// The same where Docker says what is in force.
fn switch(
    seen: &Seen,
    key: &'static str,
    wanted: bool,
    default: bool,
    in_force: Option<bool>,
) -> Result<Option<Wrong>, Unknown> {
    if let Some(wrong) = misset(seen, key, wanted, default)? {
        return Ok(Some(wrong));
    }
    match in_force {
        Some(value) if value != wanted => Ok(Some(Wrong {
            seen: format!("{key} is {value} in the Docker that runs"),
            cure: seen.renewal()?,
        })),
        _ => Ok(None),
    }
}

fn live_restore(seen: &Seen) -> Result<Option<Wrong>, Unknown> {
    let told = seen.told(LIVE_RESTORE, |f| f.live_restore)?;
    let wrong = switch(seen, LIVE_RESTORE, true, false, told)?;
    Ok(wrong.map(|wrong| match wrong.cure {
        Cure::Set(_) if seen.swarm => Wrong {
            cure: Cure::Operator(
                "Docker is part of a swarm, which excludes it: leave the swarm".to_owned(),
            ),
            ..wrong
        },
        _ => wrong,
    }))
}

fn no_new_privileges(seen: &Seen) -> Result<Option<Wrong>, Unknown> {
    let is_named = options(seen)?.map(|options| named(options, NO_NEW_PRIVILEGES).is_some());
    let told = match is_named {
        // Before version 24 it is not said (github.com/moby/moby/pull/45320).
        Some(false)
            if seen.told("its version", InForce::major)?.is_some_and(|major| major < 24) =>
        {
            None
        }
        told => told,
    };
    match switch(seen, NO_NEW_PRIVILEGES, true, false, told)? {
        None if told.is_none() => seen.untold(NO_NEW_PRIVILEGES),
        wrong => Ok(wrong),
    }
}

fn userland_proxy(seen: &Seen) -> Result<Option<Wrong>, Unknown> {
    match misset(seen, USERLAND_PROXY, false, true)? {
        None => seen.untold(USERLAND_PROXY),
        wrong => Ok(wrong),
    }
}

fn icc(seen: &Seen) -> Result<Option<Wrong>, Unknown> {
    // Without that bridge nothing is on it.
    if seen.bridge.is_none() && seen.asked_text("bridge")?.as_deref() == Some("none") {
        return Ok(None);
    }
    let told = match (seen.runs, seen.bridge) {
        (true, Some(Bridge { icc: None })) => {
            return Err(Unknown("Docker does not say what icc its default bridge has".to_owned()));
        }
        (true, Some(Bridge { icc })) => *icc,
        _ => None,
    };
    switch(seen, ICC, false, true, told)
}

/// The daemon's security options, if it runs.
fn options<'a>(seen: &Seen<'a>) -> Result<Option<&'a [String]>, Unknown> {
    match seen.in_force.filter(|_| seen.runs).map(|in_force| &in_force.security) {
        None => Ok(None),
        Some(Some(options)) => Ok(Some(options)),
        Some(None) => Err(Unknown("Docker does not say what its security options are".to_owned())),
    }
}

/// One of them, as in `name=seccomp,profile=builtin`.
fn named<'a>(options: &'a [String], name: &str) -> Option<&'a String> {
    let name = format!("name={name}");
    options.iter().find(|option| option.split(',').next() == Some(&name))
}

fn seccomp(seen: &Seen) -> Result<Option<Wrong>, Unknown> {
    const UNCONFINED: &str = "unconfined";
    if let Some(wrong) = seen.twice(SECCOMP, SECCOMP) {
        return Ok(Some(wrong));
    }
    if seen.asked_text(SECCOMP)?.as_deref() == Some(UNCONFINED) {
        let cure = match seen.flag(SECCOMP) {
            Some(_) => Cure::Operator(format!(
                "remove --{SECCOMP} there (docker.service, /etc/default/docker), and restart Docker"
            )),
            None => Cure::Set(vec![Setting { key: SECCOMP.to_owned(), value: None }]),
        };
        return Ok(Some(Wrong { seen: format!("{SECCOMP} is {UNCONFINED}"), cure }));
    }
    let Some(options) = options(seen)? else { return Ok(None) };
    Ok(match named(options, "seccomp") {
        None => Some(Wrong {
            seen: "containers run without seccomp".to_owned(),
            cure: Cure::Operator("use a kernel with CONFIG_SECCOMP_FILTER".to_owned()),
        }),
        Some(option) if option.contains("profile=unconfined") => Some(Wrong {
            seen: "containers run without a seccomp profile".to_owned(),
            cure: seen.renewal()?,
        }),
        Some(_) => None,
    })
}

fn apparmor(seen: &Seen) -> Result<Option<Wrong>, Unknown> {
    let Some(options) = options(seen)? else { return Ok(None) };
    // Where SELinux is, AppArmor is not.
    if ["apparmor", "selinux"].iter().any(|name| named(options, name).is_some()) {
        return Ok(None);
    }
    let what =
        "install the package apparmor, boot with apparmor=1 security=apparmor, and restart Docker";
    Ok(Some(Wrong {
        seen: "containers run without AppArmor".to_owned(),
        cure: Cure::Operator(what.to_owned()),
    }))
}

/// An address of `hosts` or `-H` that is reached over TCP. White space around it is cut off, as dockerd
/// does it (moby, opts/hosts.go, `ParseHost`).
fn is_tcp(host: &str) -> bool {
    let host = host.trim();
    host.starts_with("tcp://") || !host.is_empty() && !host.contains("://")
}

fn tcp(seen: &Seen) -> Result<Option<Wrong>, Unknown> {
    let wrong = |seen, what: &str| Ok(Some(Wrong { seen, cure: Cure::Operator(what.to_owned()) }));
    if let Some(door) = seen.doors.iter().find(|door| door.open) {
        let address = door.address;
        return wrong(
            format!("Docker answers anybody who reaches {address}, without a certificate"),
            "remove that address from `hosts`, -H or docker.socket, and restart Docker",
        );
    }
    let mut told: Vec<String> = Vec::new();
    told.extend(seen.flags.iter().filter(|flag| flag.name == "host").map(|f| f.value.clone()));
    match seen.key("hosts") {
        None | Some(Value::Null) => {}
        Some(Value::Array(hosts)) if hosts.iter().all(Value::is_string) => {
            told.extend(hosts.iter().filter_map(Value::as_str).map(str::to_owned));
        }
        Some(value) => {
            return Err(Unknown(format!("{} sets hosts to {value}", seen.path())));
        }
    }
    told.retain(|host| is_tcp(host));
    // What is no path and no abstract socket comes from a network, in whatever form it is written:
    // `[::]:2375`, `[fe80::1%eth0]:2375`, `vsock:2:2375`.
    let socket = seen.listen.iter().filter(|text| !text.starts_with(['/', '@']));
    told.extend(socket.cloned());
    match told.first() {
        Some(address) if !seen.asked("tlsverify", false)? => wrong(
            format!("Docker is told to listen on {address}, and not to ask for a certificate"),
            "remove that address from `hosts`, -H or docker.socket, or set tlsverify with tlscacert, \
             tlscert and tlskey, and restart Docker",
        ),
        _ => match unanswered(seen, &told)? {
            Some(Door { address, unclear: Some(why), .. }) => {
                Err(Unknown(format!("whether Docker answers anybody at {address}: {why}")))
            }
            _ => Ok(seen.twice("host", "hosts")),
        },
    }
}

/// A door of which it is not known whether it is open, and that may be Docker's API: by what Docker is
/// told, unless that has changed since it was started. Any other is the published port of a container,
/// where often nobody answers.
fn unanswered<'a>(seen: &Seen<'a>, told: &[String]) -> Result<Option<&'a Door>, Unknown> {
    let unclear: Vec<&Door> = seen.doors.iter().filter(|door| door.unclear.is_some()).collect();
    if unclear.is_empty() || seen.is_stale()? {
        return Ok(unclear.into_iter().next());
    }
    let is_told = |door: &&Door| {
        told.iter().any(|host| port(host).is_none_or(|port| port == door.address.port()))
    };
    Ok(unclear.into_iter().find(is_told))
}

/// The port of an address, if it names one.
fn port(host: &str) -> Option<u16> {
    let address = host.trim().trim_start_matches("tcp://");
    address.split('/').next()?.rsplit_once(':')?.1.parse().ok()
}
