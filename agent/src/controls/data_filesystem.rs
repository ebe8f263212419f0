//! `data-filesystem`: the data volume carries hostagent's own filesystem, and exactly that.
//!
//! This control decides whether a disk is formatted. It plans that for the disk of the confirmed
//! volume only, used by nobody and read without error, in three cases: it is blank; it holds exactly
//! what an interrupted format of this instance has written; or it holds what nothing recognises, and
//! the configuration names the volume. Whatever else is on the disk is somebody's.

use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

use crate::config::{Config, Filesystem};
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::block::{self, VolumeId, Volumes};
use crate::host::content::{self, Content, Inspection};
use crate::host::device::DataDevice;
use crate::host::format::{self, Intent, Onto};
use crate::step::Step;
use crate::volume;

/// See the module.
pub struct DataFilesystem;

/// How long looking at the disk may take: while somebody waits for a report, and in a run, when the
/// first read of a volume that was made from a snapshot is given time. Below the engine's limits.
const BRIEF: Duration = Duration::from_secs(45);
const LONG: Duration = Duration::from_secs(300);

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// Which instance this is.
    pub instance_id: Fact<String>,
    /// The data volume's device.
    pub device: Fact<DataDevice>,
    /// Who uses it.
    pub users: Fact<Vec<String>>,
    /// What is on it.
    pub content: Fact<Inspection>,
    /// What was about to be written to the volume when a format was interrupted, its image whole.
    pub intent: Fact<Option<Intent>>,
    /// Whether anything is kept of a format of the volume.
    pub remains: Fact<bool>,
    /// Whether the program that makes the filesystem is installed.
    pub tool: Fact<bool>,
}

impl Control for DataFilesystem {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "data-filesystem",
        title: "The data volume carries hostagent's filesystem",
        why: "A volume is formatted only when it is proven blank, and used only when its filesystem \
              is the one that hostagent made on this very volume. Anything else may be data.",
        requires: &["data-volume"],
        acts_after: &[],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let filesystem = cx.config.volume.filesystem;
        let limit = if cx.deadline.is_some() { LONG } else { BRIEF };
        let instance_id = cx.aws.identity().await.map(|identity| identity.instance_id.clone());
        let device = volume::find(cx).await;
        let volumes = device.as_ref().ok().map(|device| &device.volumes);
        let mut intent = volumes.map_or_else(no_device, format::intent);
        let (users, mut content) = match &device {
            Ok(device) => {
                (block::users(device.number()), content::inspect(device, None, limit).await)
            }
            Err(_) => (no_device(), no_device()),
        };
        // Only what nothing recognises can be an interrupted format of ours: it is compared with
        // what was about to be written.
        if let (Ok(seen), Ok(device), Ok(Some(begun)), Ok(instance_id)) =
            (&content, &device, &intent, &instance_id)
            && matches!(seen.content, Content::Unrecognised { .. })
            && begun.is_for(instance_id, device, filesystem)
        {
            match format::image_of(begun).await {
                Ok(image) => content = content::inspect(device, Some(image), limit).await,
                Err(e) => intent = Err(e),
            }
        }
        let remains = volumes.map_or_else(no_device, format::remains);
        Facts {
            instance_id: Fact::new("instance metadata", instance_id),
            device: Fact::new("/sys/block", device),
            users: Fact::new("/sys/block, /proc/self/mountinfo, /proc/swaps", users),
            content: Fact::new("the disk itself, and blkid -p", content),
            intent: Fact::new(format::DIR, intent),
            remains: Fact::new(format::DIR, remains),
            tool: Fact::new(format::tool(filesystem).0, format::installed(filesystem)),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let device = facts.device.known()?;
        let id = &device.volumes;
        let kind = config.volume.filesystem.as_str();
        let seen = facts.content.known()?;
        if is_ours(&seen.content, kind, id) {
            if seen.entry_types != Some(true) {
                return Ok(Verdict::fail(
                    format!("{kind} that keeps the types of directory entries"),
                    format!("{kind} on {id} does not keep them (ftype=0), and overlay2 needs them"),
                    "attach a new, empty volume and copy the data",
                ));
            }
            return Ok(Verdict::pass(format!("{kind} {} on {id}", id.filesystem_uuid())));
        }
        let provision = || "run `hostagent provision`".to_owned();
        let keep = || {
            format!(
                "if the data on {id} is not needed, attach a new, empty volume instead; hostagent \
                 never formats what is recognised"
            )
        };
        Ok(Verdict::fail(
            format!("{kind} with the UUID {}, which hostagent gives to {id}", id.filesystem_uuid()),
            describe(&seen.content, id),
            match &seen.content {
                Content::Blank { .. } | Content::Unfinished { .. } => provision(),
                Content::Unrecognised { .. } if is_named(config, id) => provision(),
                Content::Unrecognised { .. } => name_it(id),
                Content::Contradiction { .. } | Content::Signature { .. } => keep(),
            },
        ))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let device = facts.device.known()?;
        let id = &device.volumes;
        let filesystem = config.volume.filesystem;
        let content = &facts.content.known()?.content;
        if is_ours(content, filesystem.as_str(), id) {
            // The filesystem is complete: its last sector was written last.
            return Ok(match facts.remains.known() {
                Ok(true) => Plan::Steps(vec![Step::ForgetFormat { volumes: id.clone() }]),
                _ => Plan::Nothing,
            });
        }
        let what = describe(content, id);
        let onto = match content {
            Content::Blank { .. } => Onto::Blank,
            Content::Unfinished { .. } => {
                // The content was compared with the image of this intent; without it, it is nothing.
                let instance_id = facts.instance_id.known()?;
                match facts.intent.known()? {
                    Some(intent) if intent.is_for(instance_id, device, filesystem) => {
                        Onto::Unfinished
                    }
                    _ => return Ok(Plan::refuse(format!("{what}; what was begun is not known"))),
                }
            }
            Content::Unrecognised { .. } if is_named(config, id) => {
                if let Some(copy) = facts.content.known()?.remnant_of(id.filesystem_uuid())
                    && !is_begun(facts, device, filesystem)
                {
                    return Ok(Plan::refuse(format!(
                        "{what}, but it held hostagent's own filesystem: a copy of its superblock is \
                         at byte {}; repair it with fsck, or attach a new, empty volume",
                        copy.at
                    )));
                }
                Onto::Unrecognised
            }
            Content::Unrecognised { .. } => {
                let interrupted = match facts.intent.known() {
                    Err(Unknown(why)) => {
                        format!(
                            " (whether it is a format that was interrupted is not known: {why})"
                        )
                    }
                    Ok(_) => String::new(),
                };
                return Ok(Plan::refuse(format!("{what}{interrupted}; {}", name_it(id))));
            }
            Content::Contradiction { .. } | Content::Signature { .. } => {
                return Ok(Plan::refuse(format!("{what}; it is not formatted")));
            }
        };
        let users = facts.users.known()?;
        if !users.is_empty() {
            return Ok(Plan::refuse(format!("{id} is in use: {}", users.join(", "))));
        }
        if !*facts.tool.known()? {
            let (program, package) = format::tool(filesystem);
            return Ok(Plan::refuse(format!(
                "{program} is not there; install the package {package} (apt-get install {package})"
            )));
        }
        Ok(Plan::Steps(vec![Step::FormatVolume {
            uuid: id.filesystem_uuid(),
            filesystem,
            volumes: id.clone(),
            onto,
        }]))
    }
}

/// Whether a format of this disk was begun and never completed.
fn is_begun(facts: &Facts, device: &DataDevice, filesystem: Filesystem) -> bool {
    match (facts.intent.known(), facts.instance_id.known()) {
        (Ok(Some(intent)), Ok(instance_id)) => intent.is_for(instance_id, device, filesystem),
        _ => false,
    }
}

/// Whether the configuration allows unrecognised content of this volume to be destroyed.
fn is_named(config: &Config, id: &Volumes) -> bool {
    id.ids().iter().all(|id| config.volume.format_unrecognised.contains(id))
}

fn name_it(id: &Volumes) -> String {
    format!(
        "it is not formatted unless you name it: volume.format_unrecognised = [\"{}\"] lets \
         hostagent destroy what is there",
        id.ids().iter().map(VolumeId::as_str).collect::<Vec<_>>().join("\", \"")
    )
}

fn no_device<T>() -> Result<T> {
    Err(anyhow::anyhow!("the data volume's device is not known"))
}

fn is_ours(content: &Content, kind: &str, id: &Volumes) -> bool {
    matches!(content, Content::Signature { name, uuid: Some(uuid), .. }
        if name == kind && *uuid == id.filesystem_uuid().to_string())
}

fn describe(content: &Content, id: &Volumes) -> String {
    match content {
        Content::Blank { read } => format!("{id} is blank ({} MiB read)", read >> 20),
        Content::Unfinished { written } => {
            format!(
                "{id} holds a format of hostagent's that was interrupted ({} KiB)",
                written >> 10
            )
        }
        Content::Contradiction { blkid, own } => {
            format!("on {id} blkid finds {blkid}, but hostagent's own probe {own}")
        }
        Content::Unrecognised { offset } => {
            format!("{id} holds data that nothing recognises, at byte {offset}")
        }
        Content::Signature { name, uuid, label } => {
            let detail = |what: &str, value: &Option<String>| {
                value.as_ref().map(|v| format!(", {what} {v}")).unwrap_or_default()
            };
            format!("{id} carries {name}{}{}", detail("UUID", uuid), detail("label", label))
        }
    }
}

#[cfg(test)]
mod tests;
