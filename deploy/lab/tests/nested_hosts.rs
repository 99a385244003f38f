//! Hosts that are VMs with a kernel of their own, each of other hardware: they boot, their kernels' switches reach each other over the
//! emulated WAN, and nothing of them is left.

use std::time::Duration;

use supercloud_lab::{Lab, LabError, LabSpec, host_vm, lab::chain, require};

/// Everything is 20 to 40 times slower in there.
const LONG: Duration = Duration::from_secs(60);

const NAMES: [&str; 3] = ["aws-east", "gcp-west", "home"];

fn start(spec: LabSpec) -> Option<Lab> {
    if let Some(why) = host_vm::missing() {
        require::skip(why);
        return None;
    }
    match Lab::start(spec) {
        Ok(lab) => Some(lab),
        Err(error @ (LabError::NotRoot | LabError::Tools { .. })) => {
            require::skip(&error.to_string());
            None
        }
        Err(error) => panic!("{}", chain(&error)),
    }
}

/// What a command line in a host says, split at blanks.
fn said(lab: &Lab, host: &str, line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    lab.exec(host, &words, LONG).unwrap_or_else(|error| panic!("{host}: {}", chain(&error)))
}

#[test]
fn hosts_of_different_hardware_reach_each_other_by_their_kernels_switches() {
    let name = format!("t-vms-{}", std::process::id());
    let Some(lab) = start(LabSpec::three_clouds_of_vms(&name)) else { return };

    // Different machines, with virtualization.
    for (host, (disk, driver)) in
        NAMES.iter().zip([("/dev/vda", "virtio_net"), ("/dev/nvme0n1", "vmxnet3"), ("/dev/sda", "e1000e")])
    {
        let mounts = said(&lab, host, "cat /proc/mounts");
        assert!(mounts.lines().any(|line| line.starts_with(&format!("{disk} / "))), "{host}: {mounts}");
        let card = said(&lab, host, "readlink /sys/class/net/eth0/device/driver");
        assert!(card.trim().ends_with(driver), "{host}: eth0 is driven by {card}");
        said(&lab, host, "test -c /dev/kvm");
    }

    // The WAN has its delays.
    let [aws, _, home] = NAMES.map(|name| lab.host(name).unwrap());
    let times = said(&lab, "aws-east", &format!("ping -c 3 -W 5 {}", home.address()));
    let fastest: f64 =
        times.split("min/avg/max = ").nth(1).and_then(|rest| rest.split('/').next()).unwrap().parse().unwrap();
    assert!(fastest >= 40.0, "{times}");

    // A tunnel between two kernels' switches.
    for (host, own, other) in [("aws-east", 1, &home), ("home", 2, &aws)] {
        let (port, remote) = (format!("tun{own}"), other.overlay_address());
        said(
            &lab,
            host,
            &format!(
                "ovs-vsctl --timeout=30 add-br br-x -- set bridge br-x datapath_type=system fail_mode=standalone \
                 -- add-port br-x {port} -- set interface {port} type=vxlan options:remote_ip={remote} options:key=7"
            ),
        );
        said(&lab, host, &format!("ip address add 10.9.9.{own}/24 dev br-x"));
        said(&lab, host, "ip link set br-x up mtu 1450");
    }
    said(&lab, "aws-east", "ping -c 3 -W 5 10.9.9.2");
    assert!(said(&lab, "aws-east", "ovs-dpctl show").contains("vxlan_sys"), "the tunnel is not in the kernel");

    // A power cut takes the host at once; its disk stays.
    said(&lab, "gcp-west", "touch /root/mark");
    said(&lab, "gcp-west", "sync");
    lab.kill_host("gcp-west").unwrap();
    assert!(lab.exec("gcp-west", &["true"], LONG).is_err(), "a host without power answers");
    lab.boot_host("gcp-west").unwrap();
    said(&lab, "gcp-west", "test -e /root/mark");
    said(&lab, "gcp-west", &format!("ping -c 1 -W 5 {}", aws.address()));

    let folder = lab.path("");
    let index = lab.index();
    lab.stop().unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert!(!folder.exists(), "the lab's folder is left");
    assert!(supercloud_lab::netns::list(&index.namespace_prefix()).is_empty(), "a namespace is left");
    let of_lab = |process: &supercloud_lab::process::ProcessId| process.command_line().contains(&name);
    let left: Vec<_> = supercloud_lab::process::all().into_iter().filter(of_lab).collect();
    assert!(left.is_empty(), "{left:?}");
}
