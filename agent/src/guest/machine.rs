//! A guest's description, as the controller gives it, turned into what a back end is told: pure.

use std::path::{Path, PathBuf};

use supercloud_api::{
    Code, CompatClass, Problem,
    link::{BootSpec, GuestSpec},
};
use supercloud_blanket::{
    Launch, MachineSpec,
    device::{Boot, Clock, Console, Disk, GuestDevices, Mac, Nic},
    host::{HostArgs, NbdSocket},
};
use supercloud_handover::DestinationPlan;
use supercloud_sdn::tap::tap_name;

use super::record::{CopyRecord, Places, VolumeOrigin};

/// The name of the seed disk in a machine's spec.
pub const SEED_DISK: &str = "seed";

/// The file of a boot part (kernel, initial RAM disk) in the agent's cache; its content root names it.
#[must_use]
pub fn boot_file(cache: &Path, root: &str) -> PathBuf {
    // A root is hexadecimal; anything else must not become a path.
    let name: String = root.chars().filter(char::is_ascii_alphanumeric).take(64).collect();
    cache.join(name)
}

/// Describes the copy that an operation is to make here.
///
/// # Errors
/// When the description cannot be run, by name.
pub fn describe(
    plan: &DestinationPlan,
    spec: &GuestSpec,
    class: &CompatClass,
    places: &Places,
    cache: &Path,
    origin: VolumeOrigin,
    has_balloon: bool,
) -> Result<CopyRecord, Problem> {
    let bad = |detail: String| Problem::new(Code::BadRequest, detail);
    if spec.guest != plan.guest {
        return Err(bad(format!("the assignment is for {}, the order for {}", spec.guest, plan.guest)));
    }
    let volumes: Vec<_> = spec.volumes.iter().map(|volume| places.volume(volume.volume)).collect();
    let mut host = HostArgs {
        console_socket: Some(places.console_socket()),
        console_log: Some(places.console_log()),
        ..HostArgs::default()
    };
    let mut disks = Vec::new();
    for (index, home) in volumes.iter().enumerate() {
        let name = format!("disk{index}");
        host.disks.insert(name.clone(), NbdSocket { socket: home.nbd_socket(), export: String::new() });
        disks.push(Disk { name, is_read_only: false });
    }
    let mut nics = Vec::new();
    for (index, port) in spec.ports.iter().enumerate() {
        let name = format!("net{index}");
        let mac: Mac = port.mac.parse().map_err(|error| bad(format!("port {}: {error}", port.port)))?;
        host.taps.insert(name.clone(), tap_name(port.port));
        nics.push(Nic { name, mac, mtu: port.mtu });
    }
    let boot = match &spec.boot {
        BootSpec::Disk => Boot::Disk,
        BootSpec::Kernel { kernel_root, initrd_root, cmdline, .. } => {
            host.kernel = Some(boot_file(cache, kernel_root));
            host.initrd = initrd_root.as_ref().map(|root| boot_file(cache, root));
            Boot::Kernel { has_initrd: initrd_root.is_some(), cmdline: cmdline.clone() }
        }
    };
    // A guest that boots a kernel of ours finds its data at the metadata service (or not at all); a whole disk image
    // looks for a seed disk, which works before the network does.
    let seed = (spec.boot == BootSpec::Disk).then(|| {
        let home = seed_home(places);
        host.disks.insert(SEED_DISK.to_owned(), NbdSocket { socket: home.nbd_socket(), export: String::new() });
        disks.push(Disk { name: SEED_DISK.to_owned(), is_read_only: true });
        home
    });
    let machine = MachineSpec {
        class: class.clone(),
        vcpus: spec.shape.vcpus,
        memory_bytes: spec.shape.memory_bytes,
        boot,
        clock: Clock::Utc,
        devices: GuestDevices { disks, nics, console: Console::Serial, has_rng: true, has_balloon },
    };
    let launch = Launch { guest: plan.guest, epoch: plan.epoch(), spec: machine, host };
    launch.check().map_err(|error| bad(error.to_string()))?;
    Ok(CopyRecord {
        epoch: plan.epoch(),
        operation: plan.operation,
        spec: spec.clone(),
        launch,
        volumes,
        seed,
        origin,
        sealed: Vec::new(),
    })
}

fn seed_home(places: &Places) -> crate::volumes::VolumeHome {
    crate::volumes::VolumeHome {
        volume: supercloud_ids::VolumeId::from_uuid(uuid::Uuid::nil()),
        folder: places.folder.join("seed"),
        run: places.run.join("seed"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use supercloud_api::{
        Propagation, Shape,
        link::{PortSpec, Secret, VolumeSpec},
    };
    use supercloud_handover::{OperationKind, Owner, Stamp};
    use supercloud_ids::{Epoch, GuestId, HostId, NetworkId, OperationId, PortId, ProjectId, VolumeId};

    use super::*;

    pub(crate) fn class() -> CompatClass {
        CompatClass {
            back_end: "fake".into(),
            accelerator: "none".into(),
            machine_version: "1".into(),
            cpu_baseline: "any".into(),
        }
    }

    pub(crate) fn spec(guest: GuestId) -> GuestSpec {
        GuestSpec {
            guest,
            name: "web".parse().unwrap(),
            project: ProjectId::generate(),
            project_key: Secret([5; 32]),
            shape: Shape { vcpus: 1, memory_bytes: 128 << 20 },
            compat_class: None,
            boot: BootSpec::Disk,
            volumes: vec![VolumeSpec {
                volume: VolumeId::generate(),
                size_bytes: 1 << 20,
                base_root: None,
                propagation: Propagation::HotStandby,
            }],
            ports: vec![PortSpec {
                port: PortId::generate(),
                network: NetworkId::generate(),
                mac: "02:00:00:00:00:01".into(),
                ipv4: "10.0.0.2".parse().unwrap(),
                mtu: 1450,
            }],
            user_data: None,
        }
    }

    fn plan(guest: GuestId) -> DestinationPlan {
        let to = HostId::generate();
        DestinationPlan {
            guest,
            operation: OperationId::generate(),
            turn: 1,
            kind: OperationKind::Start { to },
            from: Stamp { owner: Owner::Unowned, epoch: Epoch::ZERO },
            to,
            holders: Vec::new(),
        }
    }

    #[test]
    fn every_disk_and_port_gets_its_end() {
        let guest = GuestId::generate();
        let places = Places::new(Path::new("/d"), Path::new("/r"), guest);
        let spec = spec(guest);
        let copy =
            describe(&plan(guest), &spec, &class(), &places, Path::new("/c"), VolumeOrigin::Fresh, true).unwrap();
        assert_eq!(copy.epoch, Epoch(1));
        assert_eq!(copy.launch.host.taps["net0"], tap_name(spec.ports[0].port));
        assert_eq!(copy.launch.spec.devices.disks.len(), 2);
        assert!(copy.launch.spec.devices.disks[1].is_read_only && copy.seed.is_some());
        // What a kernel of ours boots has no seed disk.
        let mut kernel = spec;
        kernel.boot = BootSpec::Kernel {
            image: supercloud_ids::ImageId::generate(),
            kernel_root: "ab".into(),
            initrd_root: None,
            cmdline: "console=ttyS0".into(),
        };
        let copy =
            describe(&plan(guest), &kernel, &class(), &places, Path::new("/c"), VolumeOrigin::Fresh, true).unwrap();
        assert_eq!(copy.launch.host.kernel.as_deref(), Some(Path::new("/c/ab")));
        assert!(copy.seed.is_none());
    }

    #[test]
    fn what_cannot_be_run_is_named() {
        let guest = GuestId::generate();
        let places = Places::new(Path::new("/d"), Path::new("/r"), guest);
        let go = |spec: &GuestSpec| {
            describe(&plan(guest), spec, &class(), &places, Path::new("/c"), VolumeOrigin::Fresh, true)
                .map(drop)
                .unwrap_err()
                .detail
        };
        let mut bad = spec(guest);
        bad.ports[0].mac = "nonsense".into();
        assert!(go(&bad).contains("mac"), "{}", go(&bad));
        let mut bad = spec(guest);
        bad.shape.vcpus = 0;
        assert!(go(&bad).contains("vcpus"));
        assert!(go(&spec(GuestId::generate())).contains("assignment"));
    }

    #[test]
    fn a_root_never_becomes_another_path() {
        assert_eq!(boot_file(Path::new("/c"), "../../etc/passwd"), Path::new("/c/etcpasswd"));
    }
}
