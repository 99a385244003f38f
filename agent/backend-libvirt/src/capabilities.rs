//! What this host's libvirt and QEMU can run, from libvirt's own XML; pure but for the asking.
//!
//! The answers are read by looking for the elements that matter; they come from the local daemon.

use supercloud_blanket::CompatClass;

use crate::{Accelerator, BACK_END, metadata::attribute};

/// CPU models that a class may name, the preferred one first. The first two are of no vendor: guests can move between
/// hosts of any.
const BASELINES: [&str; 8] =
    ["qemu64", "kvm64", "Nehalem", "Westmere", "SandyBridge", "Haswell-noTSX", "Skylake-Server-noTSX-IBRS", "EPYC"];

/// Machine versions offered: the newest few, so that hosts of different age have one in common.
const MACHINES_OFFERED: usize = 4;

/// The `pc-i440fx-X.Y` machines in a capabilities document, the newest first.
pub(crate) fn machines(xml: &str) -> Vec<String> {
    let mut found: Vec<(u32, u32)> = xml
        .split("<machine ")
        .skip(1)
        .filter_map(|rest| {
            let text = rest.split_once('>')?.1.split('<').next()?;
            let (major, minor) = text.strip_prefix("pc-i440fx-")?.split_once('.')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        })
        .collect();
    found.sort_unstable();
    found.dedup();
    found.iter().rev().take(MACHINES_OFFERED).map(|(major, minor)| format!("pc-i440fx-{major}.{minor}")).collect()
}

/// The baselines that a domain-capabilities document calls usable, in our order.
pub(crate) fn baselines(xml: &str) -> Vec<&'static str> {
    let usable: Vec<&str> = xml
        .split("<model ")
        .skip(1)
        .filter_map(|rest| {
            let (head, tail) = rest.split_once('>')?;
            // `attribute` wants a blank before the name; the split took it.
            let is_usable = head.starts_with("usable='yes'") || attribute(head, "usable") == Some("yes");
            is_usable.then(|| tail.split('<').next()).flatten()
        })
        .collect();
    BASELINES.into_iter().filter(|name| usable.contains(name)).collect()
}

/// All classes of one accelerator, the preferred one first.
pub(crate) fn classes(accelerator: Accelerator, machines: &[String], baselines: &[&str]) -> Vec<CompatClass> {
    let one = |machine: &String, cpu: &str| CompatClass {
        back_end: BACK_END.to_owned(),
        accelerator: accelerator.name().to_owned(),
        machine_version: machine.clone(),
        cpu_baseline: cpu.to_owned(),
    };
    machines.iter().flat_map(|machine| baselines.iter().map(move |cpu| one(machine, cpu))).collect()
}

/// libvirt's version number as text.
pub(crate) fn version(number: u32) -> String {
    format!("{}.{}.{}", number / 1_000_000, number / 1000 % 1000, number % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_machines_come_first_and_others_are_left_out() {
        let xml = "<guest><machine maxCpus='255'>pc-i440fx-7.2</machine>\
                   <machine canonical='pc-i440fx-7.2' maxCpus='255'>pc</machine>\
                   <machine maxCpus='255'>pc-i440fx-2.12</machine><machine maxCpus='255'>pc-i440fx-6.2</machine>\
                   <machine maxCpus='288'>pc-q35-7.2</machine><machine maxCpus='1'>pc-i440fx-jammy</machine>\
                   <machine maxCpus='255'>pc-i440fx-10.0</machine><machine maxCpus='255'>pc-i440fx-7.2</machine>\
                   <machine maxCpus='255'>pc-i440fx-4.1</machine><machine";
        assert_eq!(machines(xml), ["pc-i440fx-10.0", "pc-i440fx-7.2", "pc-i440fx-6.2", "pc-i440fx-4.1"]);
        assert_eq!(machines("<machine"), Vec::<String>::new());
    }

    #[test]
    fn only_usable_models_are_offered_in_our_order() {
        let xml = "<model fallback='forbid'>EPYC</model><model usable='yes' vendor='Intel'>Nehalem</model>\
                   <model usable='no' vendor='AMD'>EPYC</model><model usable='yes' vendor='unknown'>qemu64</model>\
                   <model vendor='Intel' usable='yes'>Westmere</model>";
        assert_eq!(baselines(xml), ["qemu64", "Nehalem", "Westmere"]);
    }

    #[test]
    fn classes_prefer_the_newest_machine_and_the_widest_cpu() {
        let machines = ["pc-i440fx-7.2".to_owned(), "pc-i440fx-6.2".to_owned()];
        let classes = classes(Accelerator::Tcg, &machines, &["qemu64", "Nehalem"]);
        let texts: Vec<String> = classes.iter().map(ToString::to_string).collect();
        assert_eq!(texts.first().map(String::as_str), Some("libvirt-qemu/tcg/pc-i440fx-7.2/qemu64"));
        assert_eq!(texts.last().map(String::as_str), Some("libvirt-qemu/tcg/pc-i440fx-6.2/Nehalem"));
        assert_eq!(texts.len(), 4);
    }
}
