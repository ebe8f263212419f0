//! `swap`: what containers have in memory is swapped to nothing but the data volume, memory or an
//! encrypting device, now and from the next boot on.
//!
//! A root volume that is encrypted does not count: it is copied into images and snapshots that
//! outlive the data, under other rules. That the mount point has the data volume on it is the
//! business of `data-mount`.

use std::path::Path;

use serde::Serialize;

use super::bar;
use crate::config::Config;
use crate::control::{About, Context, Control, Fact, Plan, Unknown, Verdict};
use crate::host::block::DevNum;
use crate::host::ground::Ground;
use crate::host::mounts::{self, unit_name};
use crate::host::swap::{self, Place, Start, fits};
use crate::step::Step;

/// See the module.
pub struct Swap;

/// What is observed.
#[derive(Debug, Serialize)]
pub struct Facts {
    /// What the kernel swaps to.
    pub active: Fact<Vec<swap::Swap>>,
    /// What it will swap to from the next boot on.
    pub starts: Fact<Vec<Start>>,
    /// The device that is mounted on the data volume's mount point.
    pub data: Fact<Option<DevNum>>,
    /// How many bytes of memory can be had without swapping.
    pub available: Fact<u64>,
}

impl Control for Swap {
    type Facts = Facts;

    const ABOUT: About = About {
        id: "swap",
        title: "Memory is swapped to no plain disk",
        why: "What a container holds in memory is patient data. Swapped out, it stays on the root \
              disk and in every image that is made of it.",
        requires: &[],
        acts_after: &[],
    };

    async fn observe(&self, cx: &Context) -> Facts {
        let starts = async { swap::starts(cx.host.systemd().await?).await }.await;
        let data = mounts::at(cx.config.volume.mount_point.path());
        Facts {
            active: Fact::new("/proc/swaps", swap::active()),
            starts: Fact::new("systemd (D-Bus), /etc/fstab", starts),
            data: Fact::new(
                "/proc/self/mountinfo",
                data.map(|mounts| mounts.last().map(|mount| mount.device)),
            ),
            available: Fact::new("/proc/meminfo", swap::available_memory()),
        }
    }

    fn judge(&self, config: &Config, facts: &Facts) -> Result<Verdict, Unknown> {
        let leaks = Leaks::of(config, facts)?;
        let expected = format!(
            "no swap but on {}, in zram or on dm-crypt, now and at the next boot",
            config.volume.mount_point
        );
        let remedy = "run `hostagent provision`";
        if let Some(swap) = leaks.active.first() {
            let observed = format!("the kernel swaps to {} on {}", swap.path, on(&swap.place));
            return Ok(Verdict::fail(expected, observed, remedy));
        }
        if let Some(start) = leaks.starts.first() {
            let observed = format!(
                "from the next boot on, {} is swapped to ({}, by {})",
                start.path.display(),
                start.unit,
                start.by
            );
            return Ok(Verdict::fail(expected, observed, remedy));
        }
        let names: Vec<&str> =
            facts.active.known()?.iter().map(|swap| swap.path.as_str()).collect();
        if names.is_empty() {
            return Ok(Verdict::pass("nothing is swapped to"));
        }
        let names = names.join(", ");
        Ok(Verdict::pass(format!("swap is on the data volume, in memory or encrypted: {names}")))
    }

    fn plan(&self, config: &Config, facts: &Facts) -> Result<Plan, Unknown> {
        let leaks = Leaks::of(config, facts)?;
        let (mut steps, mut refused) = (Vec::new(), Vec::new());
        let used = leaks.active.iter().map(|swap| swap.used).sum();
        if fits(used, *facts.available.known()?) {
            steps.extend(leaks.active.iter().map(|swap| Step::StopSwap {
                unit: unit_name(Path::new(&swap.path), "swap"),
                path: swap.path.clone(),
            }));
        } else {
            refused.push(format!(
                "{} MiB are swapped out, and only {} MiB of memory are available: stop what takes \
                 memory and try again, or reboot",
                used >> 20,
                facts.available.known()? >> 20
            ));
        }
        if !leaks.starts.is_empty() {
            steps.extend(leaks.starts.iter().map(|start| bar(&start.unit, Self::ABOUT.id)));
            steps.push(Step::ReloadManager);
        }
        Ok(Plan::with_refusals(steps, &refused))
    }
}

/// What is swapped to where it must not be.
struct Leaks<'a> {
    active: Vec<&'a swap::Swap>,
    starts: Vec<&'a Start>,
}

impl<'a> Leaks<'a> {
    fn of(config: &Config, facts: &'a Facts) -> Result<Self, Unknown> {
        let data = *facts.data.known()?;
        let fit = |place: &Place| {
            (place.filesystem.is_some() && place.filesystem == data)
                || (!place.ground.is_empty() && place.ground.iter().all(Ground::hides))
        };
        // What is not there yet is told by its path: below the mount point there is nothing but the
        // volume, for the directory underneath is immutable.
        let will_be = |start: &Start| match &start.place {
            Some(place) => fit(place),
            None => {
                start.path.starts_with(config.volume.mount_point.path())
                    || start.path.to_string_lossy().starts_with("/dev/zram")
            }
        };
        Ok(Self {
            active: facts.active.known()?.iter().filter(|swap| !fit(&swap.place)).collect(),
            starts: facts.starts.known()?.iter().filter(|start| !will_be(start)).collect(),
        })
    }
}

fn on(place: &Place) -> String {
    place.ground.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::block::{self, Disk};
    use anyhow::anyhow;
    use std::path::PathBuf;

    const DATA: DevNum = DevNum { major: 259, minor: 1 };
    const ROOT: DevNum = DevNum { major: 254, minor: 1 };

    fn disk(name: &str, number: DevNum) -> Ground {
        Ground::Disk(Disk {
            name: name.into(),
            number,
            serial: None,
            model: None,
            size: 1,
            told_by: block::ToldBy::Serial,
            sequence: None,
        })
    }

    fn on_root() -> Place {
        Place { filesystem: Some(ROOT), ground: vec![disk("vda", ROOT)] }
    }

    fn on_data() -> Place {
        Place { filesystem: Some(DATA), ground: vec![disk("nvme1n1", DATA)] }
    }

    fn device(ground: Vec<Ground>) -> Place {
        Place { filesystem: None, ground }
    }

    fn swap(path: &str, place: Place) -> swap::Swap {
        swap::Swap { path: path.into(), used: 1 << 20, place }
    }

    fn start(path: &str, place: Option<Place>) -> Start {
        let path = PathBuf::from(path);
        Start { unit: unit_name(&path, "swap"), path, by: "/etc/fstab".into(), place }
    }

    fn facts(active: Vec<swap::Swap>, starts: Vec<Start>) -> Facts {
        Facts {
            active: Fact::new("t", Ok(active)),
            starts: Fact::new("t", Ok(starts)),
            data: Fact::new("t", Ok(Some(DATA))),
            available: Fact::new("t", Ok(1 << 30)),
        }
    }

    fn judge(facts: &Facts) -> String {
        match Swap.judge(&Config::default(), facts) {
            Ok(verdict) => format!("{}: {}", verdict.word(), verdict.sentence()),
            Err(Unknown(why)) => format!("unknown: {why}"),
        }
    }

    fn plan(facts: &Facts) -> Plan {
        Swap.plan(&Config::default(), facts).unwrap()
    }

    #[test]
    fn swap_is_allowed_where_nothing_plain_reaches_a_disk() {
        let zram = || Ground::Memory("zram0".into());
        let crypt = || Ground::Crypt("swap".into());
        let plain = || disk("nvme2n1", DevNum { major: 259, minor: 9 });
        let table = [
            (swap("/swapfile", on_root()), "fail"),
            (swap("/data/swap", on_data()), "pass"),
            (swap("/dev/zram0", device(vec![zram()])), "pass"),
            (swap("/dev/dm-0", device(vec![crypt()])), "pass"),
            (swap("/dev/dm-1", device(vec![crypt(), plain()])), "fail"),
            (swap("/dev/nvme2n1p1", device(vec![plain()])), "fail"),
            (swap("/dev/odd", device(vec![])), "fail"),
        ];
        for (swap, word) in table {
            let text = judge(&facts(vec![swap.clone()], vec![]));
            assert!(text.starts_with(word), "{}: {text}", swap.path);
        }
        assert_eq!(judge(&facts(vec![], vec![])), "pass: nothing is swapped to");
        // Nothing is mounted on the mount point: no file is on the data volume.
        for swap in [swap("/data/swap", on_data()), swap("/dev/vdb", device(vec![plain()]))] {
            let mut bare = facts(vec![swap], vec![]);
            bare.data = Fact::new("t", Ok(None));
            assert!(judge(&bare).starts_with("fail"), "{}", judge(&bare));
        }
    }

    #[test]
    fn what_comes_back_at_the_next_boot_fails() {
        let table = [
            (start("/swapfile", Some(on_root())), "fail"),
            (start("/gone", None), "fail"),
            (start("/dev/disk/by-uuid/1-2", None), "fail"),
            (start("/data/swap", Some(on_data())), "pass"),
            (start("/data/swap", None), "pass"),
            (start("/database/swap", None), "fail"),
            (start("/dev/zram0", None), "pass"),
        ];
        for (start, word) in table {
            let text = judge(&facts(vec![], vec![start.clone()]));
            assert!(text.starts_with(word), "{}: {text}", start.unit);
        }
    }

    #[test]
    fn swap_is_stopped_and_does_not_come_back() {
        let leaking = facts(
            vec![swap("/swapfile", on_root()), swap("/data/swap", on_data())],
            vec![start("/swapfile", Some(on_root()))],
        );
        let unit = "swapfile.swap".to_owned();
        assert_eq!(
            plan(&leaking),
            Plan::Steps(vec![
                Step::StopSwap { unit, path: "/swapfile".into() },
                bar("swapfile.swap", "swap"),
                Step::ReloadManager,
            ])
        );
        assert_eq!(plan(&facts(vec![], vec![])), Plan::Nothing);
    }

    #[test]
    fn what_does_not_fit_into_memory_stays_until_the_next_boot() {
        let mut full =
            facts(vec![swap("/swapfile", on_root())], vec![start("/swapfile", Some(on_root()))]);
        full.available = Fact::new("t", Ok(1 << 20));
        let Plan::Contain { steps, why } = plan(&full) else { panic!("{:?}", plan(&full)) };
        assert_eq!(steps, [bar("swapfile.swap", "swap"), Step::ReloadManager]);
        assert!(why.contains("reboot"), "{why}");
        // Nothing in use needs no memory.
        let Fact { seen: crate::control::Seen::Value(active), .. } = &mut full.active else {
            panic!()
        };
        active[0].used = 0;
        assert!(matches!(plan(&full), Plan::Steps(steps) if steps.len() == 3));
    }

    #[test]
    fn an_unknown_fact_never_passes() {
        let all: [fn(&mut Facts); 3] = [
            |f| f.active = Fact::new("t", Err(anyhow!("x"))),
            |f| f.starts = Fact::new("t", Err(anyhow!("x"))),
            |f| f.data = Fact::new("t", Err(anyhow!("x"))),
        ];
        for (i, hide) in all.into_iter().enumerate() {
            let mut facts = facts(vec![], vec![]);
            hide(&mut facts);
            assert!(judge(&facts).starts_with("unknown"), "case {i}: {}", judge(&facts));
            assert!(Swap.plan(&Config::default(), &facts).is_err(), "case {i}");
        }
    }
}
