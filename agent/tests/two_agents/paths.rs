//! Ways to other hosts, and flows of ports, as an agent tells them.

use supercloud_api::{
    ids::{HostId, NetworkId, PortId},
    link::{Directive, FlowsOf, PathPeer},
};

use crate::lab::Lab;

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_measures_the_ways_that_it_is_told_and_no_others() {
    let lab = Lab::begin(&[true, true]).await;
    let (from, to, nobody) = (lab.hosts[0].id, lab.hosts[1].id, HostId::generate());
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let peer = |host, address| PathPeer { host, address };
    let peers = vec![peer(to, lab.hosts[1].data_address()), peer(nobody, closed)];
    lab.eventually("the agent is there", async || lab.controller.is_linked(from)).await;
    lab.controller.direct(from, Directive::MeasurePaths { peers });
    let of = |host| lab.controller.paths(from).into_iter().find(|path| path.to == host);
    let both = async || of(to).is_some_and(|path| path.answered > 1) && of(nobody).is_some();
    lab.eventually("both were probed", both).await;
    let (there, away) = (of(to).unwrap(), of(nobody).unwrap());
    assert!(there.rtt_us >= there.rtt_least_us && there.rtt_least_us > Some(0), "{there:?}");
    assert_eq!((there.misses, there.resent, there.answered), (0, 0, there.probes));
    assert!(there.answered_at_ms.is_some());
    assert!(away.is_refused && away.answered == 0 && away.misses == away.probes && away.rtt_us.is_none(), "{away:?}");
    assert!(lab.controller.paths(to).is_empty(), "nobody told that one to measure");

    lab.controller.direct(from, Directive::MeasurePaths { peers: vec![peer(to, lab.hosts[1].data_address())] });
    lab.eventually("the other one is forgotten", async || of(nobody).is_none() && of(to).is_some()).await;
    // Probes are nothing to the data plane: a guest moves as ever.
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    lab.done(guest, lab.migrate(1)).await;
    lab.check(guest).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn flows_are_told_of_ports_that_are_here() {
    let lab = Lab::begin(&[true]).await;
    let guest = lab.add_guest();
    lab.start(guest, 0).await;
    let host = &lab.hosts[0];
    let here: PortId = *host.switch.attached.lock().unwrap().keys().next().unwrap();
    let ask = |asked, port| {
        let of = FlowsOf { port, network: NetworkId::generate() };
        lab.controller.direct(host.id, Directive::TellFlows { asked, of });
    };
    ask(1, here);
    ask(2, PortId::generate());
    let told = |asked| lab.controller.flows(host.id, asked);
    lab.eventually("both are answered", async || told(1).is_some() && told(2).is_some()).await;
    assert_eq!(told(1).unwrap().map(|told| told.left_out), Ok(0));
    assert!(told(2).unwrap().unwrap_err().detail.contains("no tap is attached"));
}
