//! Which device is the data volume: of the volumes that EC2 has attached, those that the
//! configuration selects; of the kernel's disks, theirs; and what stands on them. Several volumes
//! beneath LVM or md are judged by the weakest.
//!
//! [`state`] is pure. What is on the device, and whether it is mounted, is not decided here.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::aws::ec2::AttachedVolume;
use crate::config::{Config, Select};
use crate::control::{Context, Unknown};
use crate::host::block::{self, DevNum, Disk, ToldBy, Volumes};
use crate::host::chain::{self, Kind, Layer};
use crate::host::device::DataDevice;

/// What is known of volumes and disks.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The volumes that EC2 has attached.
    pub attached: &'a [AttachedVolume],
    /// The kernel's disks.
    pub disks: &'a [Disk],
    /// The disks beneath `/`.
    pub root: &'a [Disk],
    /// The device that the configuration says stands on the volumes; none if there is none yet.
    pub assembled: Option<&'a Layer>,
}

/// What that says of the data volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It can never be the data volume as it is.
    Unfit(Misfit),
    /// It may come: EC2 has not attached it, or the kernel has no disk of it yet.
    Missing(Misfit),
    /// All is well.
    Fit(Fit),
}

/// How it differs from what is required.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfit {
    /// What is required.
    pub expected: String,
    /// What was seen.
    pub observed: String,
    /// What an operator can do about it.
    pub remedy: String,
}

/// A data volume that is fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fit {
    /// The device.
    pub device: DataDevice,
    /// The volumes as EC2 describes them.
    pub volumes: Vec<AttachedVolume>,
}

fn missing(expected: String, observed: String, remedy: &str) -> State {
    State::Missing(Misfit { expected, observed, remedy: remedy.to_owned() })
}

/// Decides. Unknown if the answers contradict each other.
pub fn state(config: &Config, known: Known<'_>) -> Result<State, Unknown> {
    let select = &config.volume.select;
    let expected = format!("an encrypted volume attached {select}");
    let disks = with_mapping(known.disks, known.attached)?;
    let selected = selected(select, known.attached)?;
    // One that is unfit is not waited for, whatever else is missing.
    for volume in &selected.found {
        if let Some(misfit) = unfit(config, volume)? {
            return Ok(State::Unfit(misfit));
        }
    }
    if let Some(absent) = selected.absent {
        let others: Vec<String> = known.attached.iter().map(name).collect();
        let others = match others[..] {
            [] => "EC2 has no volume attached to this instance".to_owned(),
            _ => format!("EC2 has no volume attached {absent}, only {}", others.join(", ")),
        };
        let remedy = format!("attach the data volume {absent}, or change the section [volume]");
        return Ok(missing(expected, others, &remedy));
    }
    let mut own = Vec::new();
    for volume in &selected.found {
        let id = &volume.volume_id;
        if volume.attachment.as_deref() != Some("attached") {
            let state = volume.attachment.as_deref().unwrap_or("unknown");
            let observed = format!("{} is in the state {state}", name(volume));
            return Ok(missing(expected, observed, "wait until EC2 has attached it"));
        }
        let same: Vec<&Disk> =
            disks.iter().filter(|d| d.volume_id().as_ref() == Some(id)).collect();
        match same[..] {
            [] => {
                return Ok(missing(
                    format!("a disk with the serial number of {id}"),
                    format!("EC2 says that {id} is attached, the kernel has no such disk"),
                    "wait for the kernel to see it; if it never does, detach the volume and attach it again",
                ));
            }
            [disk] => own.push(disk.clone()),
            _ => {
                return Err(Unknown(format!(
                    "{} disks have the serial number of {id}",
                    same.len()
                )));
            }
        }
        if known.root.iter().any(|root| same.iter().any(|disk| root.number == disk.number)) {
            return Ok(State::Unfit(Misfit {
                expected: "a data volume beside the root volume".into(),
                observed: format!("{id} is the root volume"),
                remedy: "attach a volume of its own for the data, and change the section [volume]"
                    .into(),
            }));
        }
    }
    let volumes: Vec<AttachedVolume> = selected.found.into_iter().cloned().collect();
    let ids: Volumes = volumes.iter().map(|v| v.volume_id.clone()).collect::<Vec<_>>().into();
    let device = match (&config.volume.assembled, &own[..]) {
        (None, [disk]) => DataDevice::of_disk(ids.ids()[0].clone(), disk.clone()),
        (None, _) => {
            return Ok(State::Unfit(Misfit {
                expected: "one data volume, or volume.assembled".into(),
                observed: format!("{} volumes are attached {select}: {ids}", own.len()),
                remedy: "set volume.assembled to the device that stands on them, such as \
                         \"/dev/mapper/data\""
                    .into(),
            }));
        }
        (Some(path), _) => {
            let Some(layer) = known.assembled else {
                return Ok(missing(
                    format!("{path} on {ids}"),
                    format!("there is no device {path}"),
                    "see why LVM, md or dm-crypt has not made it; hostagent does not",
                ));
            };
            let layer = resolved(layer.clone(), &disks);
            if let Some(misfit) = stands_elsewhere(path.as_str(), &layer, &ids) {
                return Ok(State::Unfit(misfit));
            }
            DataDevice { volumes: ids, layer }
        }
    };
    Ok(State::Fit(Fit { device, volumes }))
}

fn name(volume: &AttachedVolume) -> String {
    format!("{} as {}", volume.volume_id, volume.device.as_deref().unwrap_or("an unknown name"))
}

/// The selected volumes that EC2 has attached, and the selection of one that it has not.
struct Selected<'a> {
    found: Vec<&'a AttachedVolume>,
    absent: Option<String>,
}

fn selected<'a>(select: &Select, attached: &'a [AttachedVolume]) -> Result<Selected<'a>, Unknown> {
    let mut all = Selected { found: Vec::new(), absent: None };
    let mut one = |wanted: Select, is: &dyn Fn(&AttachedVolume) -> bool| {
        let same: Vec<&AttachedVolume> = attached.iter().filter(|v| is(v)).collect();
        match same[..] {
            [] => _ = all.absent.get_or_insert(wanted.to_string()),
            [volume] => all.found.push(volume),
            _ => {
                return Err(Unknown(format!("EC2 names {} volumes attached {wanted}", same.len())));
            }
        }
        Ok(())
    };
    match select {
        Select::Device(names) => {
            for wanted in names {
                one(Select::Device(vec![wanted.clone()]), &|v| {
                    v.device.as_deref().is_some_and(|d| wanted.is(d))
                })?;
            }
        }
        Select::Id(ids) => {
            for id in ids {
                one(Select::Id(vec![id.clone()]), &|v| v.volume_id == *id)?;
            }
        }
        Select::Tag(tag) => {
            let carries = |v: &&AttachedVolume| v.tags.get(&tag.key) == Some(&tag.value);
            all.found = attached.iter().filter(carries).collect();
            if all.found.is_empty() {
                all.absent = Some(select.to_string());
            }
        }
    }
    Ok(all)
}

/// Whether the volume, attached or not yet, can never be the data volume as it is.
fn unfit(config: &Config, volume: &AttachedVolume) -> Result<Option<Misfit>, Unknown> {
    let id = &volume.volume_id;
    let remedy = "attach a volume that is encrypted with an accepted key; a volume's encryption \
                  cannot be changed, but an encrypted copy can be made from a snapshot";
    let misfit = |expected: &str, observed: String, remedy: &str| {
        Ok(Some(Misfit { expected: expected.into(), observed, remedy: remedy.into() }))
    };
    match volume.encrypted {
        None => return Err(Unknown(format!("EC2 does not say whether {id} is encrypted"))),
        Some(false) => {
            return misfit("an encrypted volume", format!("{id} is not encrypted"), remedy);
        }
        Some(true) => {}
    }
    if volume.attachments != 1 {
        return misfit(
            "a volume that is attached to this instance alone",
            format!("{id} is attached to {} instances", volume.attachments),
            "attach a volume of this instance's own; two hosts destroy one ext4",
        );
    }
    let accepted = &config.volume.kms_keys;
    if config.volume.accepts_key(volume.kms_key_id.as_deref()) {
        return Ok(None);
    }
    match &volume.kms_key_id {
        None => Err(Unknown(format!("EC2 does not say with which key {id} is encrypted"))),
        Some(key) => misfit(
            &format!("encryption with {}", accepted.join(" or ")),
            format!("{id} is encrypted with {key}"),
            remedy,
        ),
    }
}

/// What is wrong with what the assembled device stands on, if anything is: it must be these volumes
/// and no other.
fn stands_elsewhere(path: &str, layer: &Layer, ids: &Volumes) -> Option<Misfit> {
    let misfit = |observed: String| {
        Some(Misfit {
            expected: format!("{path} on {ids}, and on nothing else"),
            observed,
            remedy: "choose all volumes beneath it in the section [volume], or take what is not \
                     chosen out of it"
                .into(),
        })
    };
    let mut beneath = Vec::new();
    for end in layer.ends() {
        match end.map(|disk| (disk.volume_id(), &disk.name)) {
            Ok((Some(id), _)) => beneath.push(id),
            Ok((None, name)) => {
                return misfit(format!("{path} stands on {name}, which is no EBS volume"));
            }
            Err(name) => return misfit(format!("{path} stands on {name}, which is no disk")),
        }
    }
    let beneath = Volumes::from(beneath);
    if beneath == *ids { None } else { misfit(format!("{path} stands on {beneath}")) }
}

/// The disks with the volumes that EC2's mapping gives to those of Xen, which have no serial number.
pub fn with_mapping(disks: &[Disk], attached: &[AttachedVolume]) -> Result<Vec<Disk>, Unknown> {
    if !disks.iter().any(|disk| matches!(disk.told_by, ToldBy::Mapping(_))) {
        return Ok(disks.to_vec());
    }
    let mut disks = disks.to_vec();
    for volume in attached.iter().filter(|v| v.attachment.as_deref() == Some("attached")) {
        let id = &volume.volume_id;
        let wanted = volume.device.as_deref().and_then(xen_name);
        // Some kernels shift the letters, so that the right name is another disk's: then names prove
        // nothing, and some volume has no disk of its name or of its size.
        let size = volume.size_gib.map(|gib| u64::from(gib) << 30);
        let same = |disk: &&mut Disk| {
            matches!(disk.told_by, ToldBy::Mapping(None))
                && Some(&disk.name) == wanted.as_ref()
                && Some(disk.size) == size
        };
        let Some(disk) = disks.iter_mut().find(same) else {
            return Err(Unknown(format!(
                "the kernel has no disk of the name and size of {}, so its names are not EC2's",
                name(volume)
            )));
        };
        disk.told_by = ToldBy::Mapping(Some(id.clone()));
    }
    Ok(disks)
}

/// The kernel's name on Xen for a device name of EC2's: `/dev/sdf` and `xvdf` are `xvdf`, and the
/// root's `/dev/sda1` is the partition of `xvda`.
fn xen_name(device: &str) -> Option<String> {
    let bare = device.strip_prefix("/dev/").unwrap_or(device);
    let letters = bare.strip_prefix("sd").or_else(|| bare.strip_prefix("xvd"))?;
    let letters = letters.trim_end_matches(|c: char| c.is_ascii_digit());
    Some(format!("xvd{letters}")).filter(|_| !letters.is_empty())
}

/// The same layers, with the volumes of the disks as they are known.
fn resolved(mut layer: Layer, disks: &[Disk]) -> Layer {
    if let Kind::Disk(disk) = &mut layer.kind
        && let Some(known) = disks.iter().find(|d| d.number == disk.number)
    {
        disk.told_by = known.told_by.clone();
    }
    layer.on = layer.on.into_iter().map(|on| resolved(on, disks)).collect();
    layer
}

/// The same layers, with what EC2's mapping tells of their disks; as they are where it tells nothing.
#[must_use]
pub fn with_volumes(layer: Layer, disks: &[Disk], attached: &[AttachedVolume]) -> Layer {
    match with_mapping(disks, attached) {
        Ok(disks) => resolved(layer, &disks),
        Err(_) => layer,
    }
}

/// The device that the configuration says stands on the volumes; none if it is not there.
pub fn assembled(config: &Config) -> Result<Option<Layer>> {
    let Some(path) = &config.volume.assembled else { return Ok(None) };
    let meta = match std::fs::metadata(path.as_str()) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).with_context(|| format!("looking at {path}")),
    };
    ensure!(meta.file_type().is_block_device(), "{path} is not a block device");
    let layer = Layer::of(DevNum::of(meta.rdev()))?;
    if layer.on.is_empty() {
        bail!("{path} is no mapping and no array; set volume.assembled for those only");
    }
    Ok(Some(layer))
}

/// Looks at the data volume now. EC2 is asked again only if the kernel's disks have changed.
pub async fn look(cx: &Context) -> Result<State> {
    let disks = block::disks()?;
    let attached = cx.aws.attached_volumes(&disks).await;
    let root = chain::disks_beneath(Path::new("/"))?;
    let assembled = assembled(&cx.config)?;
    let known = Known {
        attached: attached.known().map_err(|Unknown(why)| anyhow!(why))?,
        disks: &disks,
        root: &root,
        assembled: assembled.as_ref(),
    };
    state(&cx.config, known).map_err(|Unknown(why)| anyhow!(why))
}

/// The data device as it is now; an error while it is not fit.
pub async fn find(cx: &Context) -> Result<DataDevice> {
    match look(cx).await? {
        State::Fit(fit) => Ok(fit.device),
        State::Unfit(misfit) | State::Missing(misfit) => Err(anyhow!(misfit.observed)),
    }
}

/// The data device, which must stand on these volumes: what a step touches is what was planned.
pub async fn find_again(cx: &Context, volumes: &Volumes) -> Result<DataDevice> {
    let device = find(cx).await?;
    ensure!(device.volumes == *volumes, "the data volume is {} by now", device.volumes);
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::block::VolumeId;

    fn id(n: u32) -> VolumeId {
        VolumeId::parse(&format!("vol-0aaaaaaaaaaaaaaa{n}")).unwrap()
    }

    fn volume(n: u32, device: &str) -> AttachedVolume {
        AttachedVolume {
            volume_id: id(n),
            device: Some(device.into()),
            attachment: Some("attached".into()),
            encrypted: Some(true),
            kms_key_id: None,
            attachments: 1,
            size_gib: Some(8),
            tags: [("Use".to_owned(), "phi".to_owned())].into(),
        }
    }

    fn disk(n: u32) -> Disk {
        Disk {
            name: format!("nvme{n}n1"),
            number: DevNum { major: 259, minor: n },
            serial: Some(format!("vol0aaaaaaaaaaaaaaa{n}")),
            model: None,
            size: 8 << 30,
            told_by: ToldBy::Serial,
            sequence: None,
        }
    }

    fn xen(letter: &str, minor: u32) -> Disk {
        Disk {
            name: format!("xvd{letter}"),
            number: DevNum { major: 202, minor },
            serial: None,
            told_by: ToldBy::Mapping(None),
            ..disk(0)
        }
    }

    fn stack(disks: Vec<Disk>) -> Layer {
        let layer = |disk: Disk| DataDevice::of_disk(id(1), disk).layer;
        Layer {
            name: "dm-0".into(),
            number: DevNum { major: 253, minor: 0 },
            size: 16 << 30,
            kind: Kind::Mapping("LVM".into()),
            on: disks.into_iter().map(layer).collect(),
        }
    }

    fn config(select: Select, assembled: bool) -> Config {
        let mut config = Config::default();
        config.volume.select = select;
        if assembled {
            config.volume.assembled =
                Some(crate::config::AssembledDevice::try_from("/dev/mapper/d".to_owned()).unwrap());
        }
        config
    }

    fn ids(numbers: &[u32]) -> Select {
        Select::Id(numbers.iter().map(|n| id(*n)).collect())
    }

    fn told(config: &Config, known: Known<'_>) -> String {
        match state(config, known) {
            Ok(State::Fit(fit)) => {
                format!("fit: {} on {}", fit.device.layer.name, fit.device.volumes)
            }
            Ok(State::Missing(misfit)) => format!("missing: {}", misfit.observed),
            Ok(State::Unfit(misfit)) => format!("unfit: {}", misfit.observed),
            Err(Unknown(why)) => format!("unknown: {why}"),
        }
    }

    #[test]
    fn a_volume_is_chosen_by_name_id_or_tag() {
        let attached =
            [volume(1, "/dev/sdf"), AttachedVolume { tags: [].into(), ..volume(2, "sdg") }];
        let disks = [disk(1), disk(2)];
        let known = Known { attached: &attached, disks: &disks, root: &[], assembled: None };
        let tag = |text: &str| Select::Tag(text.to_owned().try_into().unwrap());
        let device = |name: &str| Select::Device(vec![name.to_owned().try_into().unwrap()]);
        let table = [
            (device("/dev/sdf"), "fit: nvme1n1 on vol-0aaaaaaaaaaaaaaa1"),
            (device("/dev/sdg"), "fit: nvme2n1 on vol-0aaaaaaaaaaaaaaa2"),
            (ids(&[2]), "fit: nvme2n1 on vol-0aaaaaaaaaaaaaaa2"),
            (
                ids(&[3]),
                "missing: EC2 has no volume attached with the id vol-0aaaaaaaaaaaaaaa3, only \
                         vol-0aaaaaaaaaaaaaaa1 as /dev/sdf, vol-0aaaaaaaaaaaaaaa2 as sdg",
            ),
            (tag("Use=phi"), "fit: nvme1n1 on vol-0aaaaaaaaaaaaaaa1"),
            (
                tag("Use=other"),
                "missing: EC2 has no volume attached with the tag Use=other, only \
                         vol-0aaaaaaaaaaaaaaa1 as /dev/sdf, vol-0aaaaaaaaaaaaaaa2 as sdg",
            ),
        ];
        for (select, expected) in table {
            assert_eq!(told(&config(select, false), known), expected);
        }
    }

    #[test]
    fn several_volumes_are_judged_by_the_weakest() {
        let both = [volume(1, "/dev/sdf"), volume(2, "/dev/sdg")];
        let weak = |change: fn(&mut AttachedVolume)| {
            let mut both = both.clone();
            change(&mut both[1]);
            both
        };
        let disks = [disk(1), disk(2), disk(3)];
        let known = Known { attached: &both, disks: &disks, root: &[], assembled: None };
        let wanted = config(ids(&[1, 2]), true);
        let on = |disks: &[Disk]| stack(disks.to_vec());
        let fit = on(&disks[..2]);
        assert_eq!(
            told(&wanted, Known { assembled: Some(&fit), ..known }),
            "fit: dm-0 on vol-0aaaaaaaaaaaaaaa1 and vol-0aaaaaaaaaaaaaaa2"
        );
        assert_eq!(told(&wanted, known), "missing: there is no device /dev/mapper/d");
        for (attached, expected) in [
            (weak(|v| v.encrypted = Some(false)), "unfit: vol-0aaaaaaaaaaaaaaa2 is not encrypted"),
            (weak(|v| v.encrypted = None), "unknown: EC2 does not say"),
            (
                weak(|v| v.attachment = Some("attaching".into())),
                "missing: vol-0aaaaaaaaaaaaaaa2 as",
            ),
            (weak(|v| v.attachments = 2), "unfit: vol-0aaaaaaaaaaaaaaa2 is attached to 2"),
        ] {
            let told = told(&wanted, Known { attached: &attached, assembled: Some(&fit), ..known });
            assert!(told.starts_with(expected), "{told}");
        }
        let foreign = Disk { serial: None, ..disk(9) };
        for (layer, expected) in [
            (on(&disks[..1]), "unfit: /dev/mapper/d stands on vol-0aaaaaaaaaaaaaaa1"),
            (
                on(&disks),
                "unfit: /dev/mapper/d stands on vol-0aaaaaaaaaaaaaaa1 and vol-0aaaaaaaaaaaaaaa2 and vol-0aaaaaaaaaaaaaaa3",
            ),
            (
                on(&[disk(1), disk(2), foreign]),
                "unfit: /dev/mapper/d stands on nvme9n1, which is no EBS volume",
            ),
            (on(&[]), "unfit: /dev/mapper/d stands on dm-0, which is no disk"),
        ] {
            assert_eq!(told(&wanted, Known { assembled: Some(&layer), ..known }), expected);
        }
        assert!(told(&config(ids(&[1, 2]), false), known).starts_with("unfit: 2 volumes"));
    }

    #[test]
    fn the_root_volume_is_never_the_data_volume() {
        let attached = [volume(1, "/dev/sdf")];
        let disks = [disk(1)];
        let known = Known { attached: &attached, disks: &disks, root: &disks, assembled: None };
        assert!(told(&Config::default(), known).ends_with("is the root volume"));
    }

    #[test]
    fn on_xen_names_count_only_while_all_of_them_fit() {
        let attached = [volume(1, "/dev/sda1"), volume(2, "/dev/sdf")];
        let fit = [xen("a", 0), xen("b", 16), xen("f", 80)];
        let known = Known { attached: &attached, disks: &fit, root: &[], assembled: None };
        assert_eq!(told(&Config::default(), known), "fit: xvdf on vol-0aaaaaaaaaaaaaaa2");
        // Shifted by four letters, as some kernels do: `xvdf` is another disk.
        let shifted = [xen("e", 64), xen("f", 80), xen("j", 144)];
        assert!(
            told(&Config::default(), Known { disks: &shifted, ..known }).starts_with("unknown")
        );
        let small = [xen("a", 0), Disk { size: 1 << 30, ..xen("f", 80) }];
        assert!(told(&Config::default(), Known { disks: &small, ..known }).starts_with("unknown"));
        for (name, expected) in [
            ("/dev/sdf", Some("xvdf")),
            ("xvdba", Some("xvdba")),
            ("/dev/xvda1", Some("xvda")),
            ("/dev/nvme1n1", None),
            ("/dev/sd", None),
        ] {
            assert_eq!(xen_name(name).as_deref(), expected, "{name}");
        }
    }
}
