//! `root-volume`: what the system is on is encrypted or, where the configuration lets it be plain,
//! keeps nothing that a container says.
//!
//! What a container says reaches the root disk through journald, whatever Docker's log driver is
//! (every container can name its own, and a unit that runs `docker run` has its output there),
//! through a syslog daemon that journald feeds, and through `/tmp`. Each of these places may be on a
//! volume of its own, as the CIS benchmarks have them, and is judged as `/` is. Core dumps and swap
//! are their own controls.

mod leaks;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Once;

use serde::Serialize;

use crate::aws::ec2::AttachedVolume;
use crate::config::{Config, RootEncryption};
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::block::{self, Disk};
use crate::host::ground::{self, Ground};
use crate::host::logs;
use crate::volume;
use leaks::Leaks;

/// See the module.
pub struct RootVolume;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// What `/` rests on.
    pub root: Fact<Vec<Ground>>,
    /// What `/var` rests on.
    pub var: Fact<Vec<Ground>>,
    /// What `/var/log` rests on.
    pub logs: Fact<Vec<Ground>>,
    /// What the persistent journal rests on, or would.
    pub journal: Fact<Vec<Ground>>,
    /// What `/tmp` rests on.
    pub tmp: Fact<Vec<Ground>>,
    /// What `/var/tmp` rests on.
    pub var_tmp: Fact<Vec<Ground>>,
    /// The volumes that EC2 has attached to this instance.
    pub attached: Fact<Vec<AttachedVolume>>,
    /// What could write to a plain one; looked at only where one is plain and may be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leaks: Option<Leaks>,
}

/// What is known of the encryption of what the system is on.
enum System {
    Encrypted(String),
    /// What is plain, and what helps.
    Plain(String, &'static str),
}

impl Control for RootVolume {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "root-volume",
        title: "The root volume is encrypted, and whatever else logs and temporary files are on",
        why: "What containers say ends up in logs and temporary files of the host. They are on the \
              root volume, and in every snapshot and image of it.",
        requires: &[],
        // That control is what waits for EC2's answer.
        acts_after: &["data-volume"],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let disks = block::disks();
        let attached = match &disks {
            Ok(disks) => cx.aws.attached_volumes(disks).await,
            Err(e) => Fact::new("EC2 DescribeVolumes", Err(anyhow::anyhow!("not asked: {e:#}"))),
        };
        // On Xen a disk does not tell its volume; EC2's mapping does.
        let mapped = match (&disks, attached.known()) {
            (Ok(disks), Ok(attached)) => volume::with_mapping(disks, attached).unwrap_or_default(),
            _ => Vec::new(),
        };
        let beneath = |path: &str| {
            let source = format!("{path}, /proc/self/mountinfo, /sys/dev/block");
            Fact::new(source, beneath(Path::new(path)).map(|grounds| named(grounds, &mapped)))
        };
        let mut facts = Facts {
            root: beneath("/"),
            var: beneath("/var"),
            logs: beneath(logs::LOGS),
            journal: beneath(logs::PERSISTENT_JOURNAL),
            tmp: beneath("/tmp"),
            var_tmp: beneath("/var/tmp"),
            attached,
            leaks: None,
        };
        if let (
            Ok(System::Plain(what, _)),
            policy @ (RootEncryption::Warn | RootEncryption::Allow),
        ) = (system(&facts), cx.config.root.encryption)
        {
            static WARNED: Once = Once::new();
            if policy == RootEncryption::Warn {
                WARNED.call_once(|| {
                    tracing::warn!(control = "root-volume", "{what}; root.encryption allows it");
                });
            }
            facts.leaks = Some(Leaks::observe(cx).await);
        }
        facts
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let (what, remedy) = match system(facts)? {
            System::Encrypted(what) => return Ok(Verdict::pass(what)),
            System::Plain(what, remedy) => (what, remedy),
        };
        if config.root.encryption == RootEncryption::Require {
            let expected = "/, /var, logs and temporary files on encrypted volumes";
            return Ok(Verdict::fail(expected, what, remedy));
        }
        let Some(leaks) = &facts.leaks else {
            return Err(Unknown(format!("{what}, and what is kept there was not looked at")));
        };
        if let Some(wrong) = leaks.wrong(facts)? {
            return Ok(Verdict::fail(
                "nothing of what containers say kept on a plain volume",
                format!("{what}, and {wrong}"),
                "run `hostagent provision`",
            ));
        }
        let mut text = format!("{what}; the journal and /tmp are on no plain volume");
        if config.root.encryption == RootEncryption::Warn {
            text.insert_str(0, "WARNING: ");
        } else {
            text.push_str(", and root.encryption allows it");
        }
        Ok(Verdict::pass(text))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        if let System::Encrypted(_) = system(facts)? {
            return Ok(Plan::Nothing);
        }
        if config.root.encryption == RootEncryption::Require {
            return Ok(Plan::refuse("the encryption of a volume cannot be changed"));
        }
        let Some(leaks) = &facts.leaks else {
            return Err(Unknown("what is kept on the plain volume was not looked at".into()));
        };
        leaks.plan(facts)
    }
}

const REMEDY: &str = "begin with an instance whose root volume is encrypted: from an encrypted copy \
                      of the image, with `Encrypted` in the launch template's mapping of the root \
                      device, or with EBS encryption by default in the account's region; or set \
                      root.encryption";

const REMEDY_ELSEWHERE: &str = "put what is there on an encrypted volume: one that is made from an \
                                encrypted copy of its snapshot, or with `Encrypted` in the launch \
                                template's mapping; or on the encrypted root volume; or set \
                                root.encryption";

/// What EC2 says of every disk beneath `/`, and beneath the places besides where what containers say
/// comes to rest.
fn system(facts: &Facts) -> Result<System, Unknown> {
    let (root, seen) = root_volume(facts)?;
    let remedy = if root.is_some() { REMEDY } else { REMEDY_ELSEWHERE };
    let mut named: Vec<&Ground> = plain(&facts.root, &facts.attached)?.into_iter().collect();
    let mut all: Vec<String> = root.into_iter().collect();
    for (path, grounds) in [
        ("/var", &facts.var),
        (logs::LOGS, &facts.logs),
        (logs::PERSISTENT_JOURNAL, &facts.journal),
        ("/tmp", &facts.tmp),
        ("/var/tmp", &facts.var_tmp),
    ] {
        // Each volume once: what is on `/` itself needs no words of its own.
        if let Some(layer) = plain(grounds, &facts.attached)?
            && !named.contains(&layer)
        {
            all.push(format!("{path} is on {layer}, which is not encrypted"));
            named.push(layer);
        }
    }
    Ok(if all.is_empty() {
        System::Encrypted(seen)
    } else {
        System::Plain(all.join(", and "), remedy)
    })
}

/// What is plain of the root volume, if anything is; and what is said of it if nothing is.
fn root_volume(facts: &Facts) -> Result<(Option<String>, String), Unknown> {
    let root = facts.root.known()?;
    if root.iter().all(Ground::hides) {
        return Ok((None, format!("/ is on {}", names(root))));
    }
    let attached = facts.attached.known()?;
    let mut seen = String::new();
    for layer in root.iter().filter(|layer| !layer.hides()) {
        match encryption(layer, attached)? {
            None => {
                let plain = format!("the root volume {layer} is not encrypted");
                return Ok((Some(plain), String::new()));
            }
            Some(key) => {
                let and = if seen.is_empty() { "" } else { ", and " };
                // Writing to a String cannot fail.
                _ = write!(seen, "{and}the root volume {layer} is encrypted with {key}");
            }
        }
    }
    Ok((None, seen))
}

/// The first plain disk beneath a place.
fn plain<'a>(
    grounds: &'a Fact<Vec<Ground>>,
    attached: &Fact<Vec<AttachedVolume>>,
) -> Result<Option<&'a Ground>, Unknown> {
    for layer in grounds.known()?.iter().filter(|layer| !layer.hides()) {
        if encryption(layer, attached.known()?)?.is_none() {
            return Ok(Some(layer));
        }
    }
    Ok(None)
}

/// The key with which EC2 says that a disk is encrypted; none if it says that it is not.
fn encryption(layer: &Ground, attached: &[AttachedVolume]) -> Result<Option<String>, Unknown> {
    let Ground::Disk(disk) = layer else { return Ok(Some(layer.to_string())) };
    let Some(id) = disk.volume_id() else {
        return Err(Unknown(format!("the disk {} has no volume id as serial number", disk.name)));
    };
    let volume = attached.iter().find(|volume| volume.volume_id == id);
    match volume.map(|volume| (volume.encrypted, &volume.kms_key_id)) {
        None => Err(Unknown(format!("EC2 does not name {id} among this instance's volumes"))),
        Some((None, _)) => Err(Unknown(format!("EC2 does not say whether {id} is encrypted"))),
        Some((Some(false), _)) => Ok(None),
        Some((Some(true), key)) => {
            Ok(Some(key.clone().unwrap_or_else(|| "an unnamed key".to_owned())))
        }
    }
}

/// Whether what is written there reaches no plain disk.
fn is_fit(
    grounds: &Fact<Vec<Ground>>,
    attached: &Fact<Vec<AttachedVolume>>,
) -> Result<bool, Unknown> {
    Ok(plain(grounds, attached)?.is_none() && !grounds.known()?.is_empty())
}

fn names(layers: &[Ground]) -> String {
    layers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

/// What a path rests on or, while it is not there, what it would: it would be made in the directory
/// above.
fn beneath(path: &Path) -> anyhow::Result<Vec<Ground>> {
    for above in path.ancestors() {
        if let Some(grounds) = ground::of_path(above)? {
            return Ok(grounds);
        }
        anyhow::ensure!(!above.is_symlink(), "{} is a link that leads nowhere", above.display());
    }
    anyhow::bail!("there is no {}", path.display())
}

/// The same, with the disks as they are known.
fn named(mut grounds: Vec<Ground>, disks: &[Disk]) -> Vec<Ground> {
    for ground in &mut grounds {
        if let Ground::Disk(disk) = ground
            && let Some(known) = disks.iter().find(|known| known.number == disk.number)
        {
            *disk = known.clone();
        }
    }
    grounds
}

#[cfg(test)]
mod tests;
