//! A moment of every target, and every input that once did harm.

use std::path::Path;

use supercloud_fuzz::engine::{self, Budget};
use supercloud_fuzz::targets::{TARGETS, Target};

#[test]
fn no_target_is_harmed_in_a_moment() {
    for target in TARGETS {
        let seed = 0x5c1d;
        if let Err(harm) = engine::run(target, seed, Budget::Rounds(4000)) {
            panic!("{} (seed {seed:#x}): {}: {:?}", target.name, harm.what, String::from_utf8_lossy(&harm.input));
        }
    }
}

#[test]
fn what_once_did_harm_does_none() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in TARGETS {
        let Ok(entries) = std::fs::read_dir(corpus.join(target.name)) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            let harm = engine::try_one(target, &std::fs::read(&path).unwrap());
            assert_eq!(harm.map(|harm| harm.what), None, "{}", path.display());
        }
    }
}

#[test]
fn the_engine_finds_what_is_there_to_be_found() {
    fn number() -> Vec<Vec<u8>> {
        vec![b"length: 00\n".to_vec()]
    }
    let broken = [
        Target { name: "panics", about: "", seeds: number, run: |input| assert_ne!(input.get(8), Some(&0xff)) },
        Target {
            name: "takes too much",
            about: "",
            seeds: number,
            run: |input| {
                if input.first() == Some(&b'L') {
                    drop(std::hint::black_box(Vec::<u8>::with_capacity(100 << 20)));
                }
            },
        },
    ];
    for target in &broken {
        let harm = engine::run(target, 1, Budget::Rounds(200_000)).unwrap_err();
        let again = engine::try_one(target, &harm.input).unwrap();
        assert_eq!(again.what, harm.what, "{}", target.name);
    }
}
