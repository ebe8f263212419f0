//! `sshd-hardening`: nobody logs in with a password, and no weak algorithm is offered.
//!
//! What is asked for follows the CIS benchmarks for Debian and Ubuntu (section "Configure SSH Server")
//! and Mozilla's OpenSSH guidelines, where these agree with a host that must not lock its operator out:
//! root may log in with a key, where CIS asks for `PermitRootLogin no`, and sshd's own defaults are kept
//! but for the weak algorithms among them, where Mozilla has a list of its own that ages.
//!
//! It is judged by `sshd -T`, the values in effect. What stands behind `Match` replaces them for some
//! connections, so each such line must be right by itself: which connections it would be is not asked.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::config::{Config, Hardening};
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::sshd;
use crate::host::sshd::accounts::{self, Accounts};
use crate::host::sshd::hardening::{self, DROP_IN, Setting};
use crate::host::sshd::lines::{self, Line};
use crate::host::sshd::options::{self, Told};
use crate::step::Step;

/// See the module.
pub struct SshdHardening;

/// What is observed; nothing of it where the control is off.
#[derive(Debug, Default, Serialize)]
pub struct Facts {
    /// The values in effect, of the keywords that are judged.
    pub settings: Option<Fact<BTreeMap<String, String>>>,
    /// The lines that set one of them, in all files but ours.
    pub lines: Option<Fact<Vec<Line>>>,
    /// What our file says.
    pub ours: Option<Fact<Vec<Setting>>>,
    /// What sshd is told on the command line of its next start.
    pub options: Option<Fact<Vec<Told>>>,
    /// What the sshd that runs was told, where that is something else.
    pub running: Option<Fact<Option<Vec<Told>>>>,
    /// Who can log in; looked at only where passwords are to be turned off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accounts: Option<Fact<Accounts>>,
}

/// One thing that is asked for.
struct Rule {
    /// The keyword.
    keyword: &'static str,
    /// Whether a value is right, as `sshd -T` says it.
    fits: fn(&str) -> bool,
    /// What is written where it is not.
    set: &'static str,
    /// Whether somebody who logs in with a password cannot do so any more.
    passwords: bool,
}

const fn rule(keyword: &'static str, fits: fn(&str) -> bool, set: &'static str) -> Rule {
    Rule { keyword, fits, set, passwords: false }
}

const fn password(keyword: &'static str, fits: fn(&str) -> bool, set: &'static str) -> Rule {
    Rule { keyword, fits, set, passwords: true }
}

/// What is asked for. The lists of algorithms lose what [`weak`] names, by patterns: a list of what is
/// left would keep a later sshd, which may not know them all, from starting.
const RULES: [Rule; 15] = [
    password("PermitRootLogin", |v| ROOT.contains(&v), "prohibit-password"),
    password("PasswordAuthentication", is_no, "no"),
    // With PAM, this is where passwords are asked for too.
    password("KbdInteractiveAuthentication", is_no, "no"),
    rule("PermitEmptyPasswords", is_no, "no"),
    rule("X11Forwarding", is_no, "no"),
    rule("AllowAgentForwarding", is_no, "no"),
    rule("MaxAuthTries", |v| within(v, 4), "4"),
    rule("ClientAliveInterval", |v| within(v, 300), "300"),
    rule("ClientAliveCountMax", |v| within(v, 3), "3"),
    rule("Ciphers", none_weak, "-*-cbc,3des*,arcfour*"),
    rule("MACs", none_weak, "-*md5*,*sha1*,*ripemd*,umac-64*,*-96*"),
    rule("KexAlgorithms", none_weak, "-*sha1*"),
    rule("HostKeyAlgorithms", none_weak, "-ssh-rsa,ssh-rsa-cert-v01@openssh.com,ssh-dss*"),
    rule("PubkeyAcceptedAlgorithms", none_weak, "-ssh-rsa,ssh-rsa-cert-v01@openssh.com,ssh-dss*"),
    rule("CASignatureAlgorithms", none_weak, "-ssh-rsa,ssh-dss*"),
];

/// Where root does not log in with a password.
const ROOT: [&str; 4] = ["no", "prohibit-password", "without-password", "forced-commands-only"];

/// The lists of algorithms: setting one of them again takes back what somebody else set.
const LISTS: [&str; 6] = [
    "ciphers",
    "macs",
    "kexalgorithms",
    "hostkeyalgorithms",
    "pubkeyacceptedalgorithms",
    "casignaturealgorithms",
];

/// Says which ways of logging in must be combined.
const METHODS: &str = "authenticationmethods";

/// Other names of keywords (sshd_config(5), and servconf.c for those that are not in it any more).
const ALIASES: [(&str, &str); 3] = [
    ("challengeresponseauthentication", "kbdinteractiveauthentication"),
    ("skeyauthentication", "kbdinteractiveauthentication"),
    ("pubkeyacceptedkeytypes", "pubkeyacceptedalgorithms"),
];

fn is_no(value: &str) -> bool {
    value == "no"
}

fn within(value: &str, most: u32) -> bool {
    value.parse().is_ok_and(|value: u32| (1..=most).contains(&value))
}

fn none_weak(list: &str) -> bool {
    // In a file, a list may be what the defaults lose, or what they get.
    list.starts_with('-') || !list.trim_start_matches(['+', '^']).split(',').any(weak)
}

/// Whether an algorithm is known to be weak: broken or short hashes, modes and ciphers that leak, the
/// signatures over SHA-1 that OpenSSH 8.8 turned off.
fn weak(name: &str) -> bool {
    ["md5", "sha1", "ripemd", "-cbc", "3des", "arcfour", "-96"].iter().any(|w| name.contains(w))
        || ["umac-64", "ssh-dss", "none"].iter().any(|w| name.starts_with(w))
        || ["ssh-rsa", "ssh-rsa*", "ssh-rsa-cert-v01@openssh.com"].contains(&name)
}

impl Control for SshdHardening {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "sshd-hardening",
        title: "sshd takes keys only, and no weak algorithm",
        why: "A password can be guessed, and is on every port. What a weak algorithm protects can be \
              read or changed on its way.",
        requires: &[],
        // One change of sshd at a time.
        acts_after: &["sshd-port"],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let mut facts = Facts::default();
        if cx.config.sshd.hardening == Hardening::Off {
            return facts;
        }
        if let Ok(systemd) = cx.host.systemd().await
            && let Ok(socket) = systemd.unit(sshd::SOCKET).await
        {
            sshd::wake(&socket).await;
        }
        let known = |name: &str| rule_of(name).is_some() || name == METHODS;
        let settings =
            async { hardening::settings(cx.host.systemd().await?, options::NOBODYS).await };
        let settings = settings.await.map(|mut settings| {
            settings.retain(|name, _| known(name));
            settings
        });
        let mut keywords: Vec<String> =
            RULES.iter().map(|rule| rule.keyword.to_ascii_lowercase()).collect();
        keywords.extend(ALIASES.iter().map(|(other, _)| (*other).to_owned()));
        keywords.push(METHODS.to_owned());
        let keywords: Vec<&str> = keywords.iter().map(String::as_str).collect();
        facts.settings = Some(Fact::new("sshd -T", settings));
        facts.lines = Some(Fact::new("sshd_config", lines::elsewhere(DROP_IN, &keywords)));
        facts.ours = Some(Fact::new(DROP_IN, hardening::ours()));
        let options = async { options::at_start(cx.host.systemd().await?).await };
        facts.options = Some(Fact::new("the command line in ssh.service", options.await));
        let running = async { options::running(cx.host.systemd().await?).await };
        facts.running = Some(Fact::new("the command line of sshd", running.await));
        if let Ok(wrong) = wrong(&facts)
            && cx.config.sshd.hardening == Hardening::Enforce
            && wrong.iter().any(|wrong| wrong.rule.passwords)
        {
            let source = "/etc/passwd, /etc/shadow, authorized_keys, sudo -l";
            let accounts = async { accounts::look(cx.host.systemd().await?).await };
            facts.accounts = Some(Fact::new(source, accounts.await));
        }
        facts
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        if config.sshd.hardening == Hardening::Off {
            return Ok(Verdict::NotApplicable { why: "sshd.hardening is \"off\"".to_owned() });
        }
        let mut seen: Vec<String> = wrong(facts)?.into_iter().map(|wrong| wrong.seen).collect();
        seen.extend(command_line(facts)?);
        if seen.is_empty() {
            return Ok(Verdict::pass("sshd takes keys only, and offers no weak algorithm"));
        }
        let seen = seen.join("; ");
        Ok(match config.sshd.hardening {
            Hardening::Report => Verdict::pass(format!("WARNING: {seen}")),
            _ => Verdict::fail(
                "keys only, and no weak algorithm",
                seen,
                "run `hostagent provision`; what it refuses, change in the files that it names, or \
                 set sshd.hardening to \"report\"",
            ),
        })
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        if config.sshd.hardening != Hardening::Enforce {
            return Ok(Plan::Nothing);
        }
        let (mut wanted, mut refused) = (ours(facts)?.clone(), command_line(facts)?);
        let mut passwords = false;
        let mut changed = false;
        let lines = lines_of(facts)?;
        for wrong in wrong(facts)? {
            let name = wrong.rule.keyword.to_ascii_lowercase();
            let set_by = |l: &&Line| !l.conditional && canonical(&l.keyword) == name;
            if wrong.conditional {
                refused.push(format!("behind Match, {}: change it there", wrong.seen));
            } else if set_there(wrong.rule, facts)? {
                let keyword = wrong.rule.keyword;
                refused
                    .push(format!("{keyword} is set on sshd's command line: {}", options::WHERE));
            } else if wanted.iter().any(|setting| setting.keyword == wrong.rule.keyword) {
                refused.push(format!(
                    "{} is set by something that sshd reads before {DROP_IN}: remove it there",
                    wrong.rule.keyword
                ));
            } else if let Some(line) = lines.iter().find(set_by)
                && LISTS.contains(&name.as_str())
            {
                // Ours would take back what else the operator left out.
                refused.push(format!(
                    "{}, line {}, sets {}: remove the weak ones there",
                    line.file.display(),
                    line.number,
                    wrong.rule.keyword
                ));
            } else {
                if wrong.rule.passwords {
                    if running(facts)?.is_some() {
                        // What says so is refused already; whom that lets in is not known.
                        continue;
                    }
                    let Some(accounts) = &facts.accounts else {
                        return Err(Unknown("who can log in was not looked at".to_owned()));
                    };
                    if let Err(why) = accounts.known()?.way_in() {
                        refused.push(format!("{} stays as it is: {why}", wrong.rule.keyword));
                        continue;
                    }
                    passwords = true;
                }
                changed = true;
                let (keyword, value) = (wrong.rule.keyword.to_owned(), wrong.rule.set.to_owned());
                wanted.push(Setting { keyword, value });
            }
        }
        let steps = if changed { vec![Step::HardenSshd { wanted, passwords }] } else { vec![] };
        Ok(Plan::with_refusals(steps, &refused))
    }
}

/// Something that is not as it is asked for.
struct Wrong {
    rule: &'static Rule,
    /// What was seen.
    seen: String,
    /// Whether it is so behind a `Match` only.
    conditional: bool,
}

fn not_looked_at() -> Unknown {
    Unknown("sshd's configuration was not looked at".to_owned())
}

fn lines_of(facts: &Facts) -> Result<&Vec<Line>, Unknown> {
    facts.lines.as_ref().ok_or_else(not_looked_at)?.known()
}

fn ours(facts: &Facts) -> Result<&Vec<Setting>, Unknown> {
    facts.ours.as_ref().ok_or_else(not_looked_at)?.known()
}

/// What is wrong with the command line: what it sets is in effect, and judged, like the rest.
fn command_line(facts: &Facts) -> Result<Vec<String>, Unknown> {
    let mut wrong = Vec::new();
    if let Some(file) =
        options::other_file(facts.options.as_ref().ok_or_else(not_looked_at)?.known()?)
    {
        wrong.push(format!(
            "sshd is told to read {file} instead of {}: take `-f {file}` out of {}",
            lines::MAIN,
            options::WHERE
        ));
    }
    wrong.extend(running(facts)?.map(|told| options::runs_otherwise(told)));
    Ok(wrong)
}

/// What the sshd that runs was told, where that is something else than at its next start.
fn running(facts: &Facts) -> Result<Option<&Vec<Told>>, Unknown> {
    Ok(facts.running.as_ref().ok_or_else(not_looked_at)?.known()?.as_ref())
}

/// The keyword of a rule, where the command line sets it: no file of ours outdoes that.
fn set_there(rule: &Rule, facts: &Facts) -> Result<bool, Unknown> {
    let told = facts.options.as_ref().ok_or_else(not_looked_at)?.known()?;
    let keyword = rule.keyword.to_ascii_lowercase();
    Ok(told.iter().filter_map(Told::keyword).any(|set| canonical(&set) == keyword))
}

/// A keyword's own name, in lower case.
fn canonical(keyword: &str) -> &str {
    ALIASES.iter().find(|(other, _)| *other == keyword).map_or(keyword, |(_, name)| name)
}

fn rule_of(keyword: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.keyword.eq_ignore_ascii_case(canonical(keyword)))
}

/// All that is not as it is asked for.
fn wrong(facts: &Facts) -> Result<Vec<Wrong>, Unknown> {
    let settings = facts.settings.as_ref().ok_or_else(not_looked_at)?.known()?;
    let lines = lines_of(facts)?;
    // A password beside a key is a second factor, as long as that is so for everybody.
    let second_factor = settings.get(METHODS).is_some_and(|methods| asks_for_a_key(methods))
        && !lines.iter().any(|line| line.conditional && line.keyword == METHODS);
    let also = |rule: &Rule| {
        second_factor
            && ["PasswordAuthentication", "KbdInteractiveAuthentication"].contains(&rule.keyword)
    };
    let mut found = Vec::new();
    for rule in &RULES {
        let name = rule.keyword.to_ascii_lowercase();
        let Some(value) = settings.get(&name) else {
            return Err(Unknown(format!("`sshd -T` does not say what {} is", rule.keyword)));
        };
        if !(rule.fits)(value) && !also(rule) {
            let seen = format!("{} is {}", rule.keyword, shown(value));
            found.push(Wrong { rule, seen, conditional: false });
        }
    }
    for line in lines.iter().filter(|line| line.conditional) {
        let Some(rule) = rule_of(&line.keyword) else { continue };
        let value = line.value.join(" ");
        let lower = value.to_ascii_lowercase();
        if !(rule.fits)(&lower) && !also(rule) {
            let (file, number) = (line.file.display(), line.number);
            let seen = format!("{} is {} in {file}, line {number}", rule.keyword, shown(&value));
            found.push(Wrong { rule, seen, conditional: true });
        }
    }
    Ok(found)
}

/// Whether every way that is allowed has a key in it.
fn asks_for_a_key(methods: &str) -> bool {
    let mut ways = methods.split_whitespace().peekable();
    ways.peek().is_some() && ways.all(|way| way.split(',').any(|method| method == "publickey"))
}

/// A value for people: of a list of algorithms the weak ones.
fn shown(value: &str) -> String {
    let weak: Vec<&str> = value.split(',').filter(|name| weak(name)).collect();
    if value.contains(',') && !weak.is_empty() { weak.join(",") } else { value.to_owned() }
}

#[cfg(test)]
mod tests;
