//! PyTorch files that are damaged, lie, or would run something.

use std::fs;

use blip2_torchx::params::TensorSource;
use blip2_weights::{TorchFile, TorchFileProblem as Problem, inspect};
use proptest::prelude::*;

use crate::fixtures::torch_fixture;
use crate::torch_bytes::{Pickle, archive, open, problem, problem_of, written, zip};

fn values(file: &TorchFile, name: &str) -> Vec<f32> {
    Vec::try_from(file.read(name).unwrap().reshape([-1])).unwrap()
}

fn forbidden(pickle: &[u8]) -> String {
    match problem_of(pickle) {
        Problem::Forbidden { name } => name,
        other => panic!("{other}"),
    }
}

fn good() -> Vec<u8> {
    Pickle::dict("w", |pickle| pickle.tensor("0", 4, 0, &[2, 2], &[2, 1]))
}

#[test]
fn the_hand_made_file_is_a_good_one() {
    assert_eq!(values(&open(&archive(&good())), "w"), [1.0, 2.0, 3.0, 4.0]);
    let transposed = Pickle::dict("w", |pickle| pickle.tensor("0", 4, 0, &[2, 2], &[1, 2]));
    assert_eq!(values(&open(&archive(&transposed)), "w"), [1.0, 3.0, 2.0, 4.0]);
}

#[test]
fn os_system_by_global_and_reduce() {
    assert_eq!(forbidden(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."), "os.system");
    // Protocol 0, as the classic attack is written.
    assert_eq!(forbidden(b"cos\nsystem\n(S'true'\ntR."), "os.system");
    // By the opcodes of old classes.
    assert_eq!(forbidden(b"(X\x04\x00\x00\x00trueios\nsystem\n."), "os.system");
}

#[test]
fn posix_system_by_stack_global() {
    let name = |pickle: Pickle, module: &str, attribute: &str| pickle.text(module).text(attribute).raw(b"\x93");
    let pickle = name(Pickle(vec![0x80, 4]), "posix", "system").text("true").raw(b"\x85R.");
    assert_eq!(forbidden(&pickle.0), "posix.system");
    // The names come out of the memo.
    let hidden = Pickle(vec![0x80, 4]).text("system").raw(b"\x940").text("posix").raw(b"h\x00\x93)R.");
    assert_eq!(forbidden(&hidden.0), "posix.system");
    // A dotted name that would begin at a harmless module.
    let dotted = name(Pickle(vec![0x80, 4]), "torch", "serialization.os.system").raw(b")R.");
    assert_eq!(forbidden(&dotted.0), "torch.serialization.os.system");
}

#[test]
fn builtins_eval_and_what_else_runs_code() {
    for (module, name) in [
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("__builtin__", "eval"),
        ("subprocess", "Popen"),
        ("importlib", "import_module"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("numpy", "load"),
        ("runpy", "_run_code"),
        ("webbrowser", "open"),
        ("nt", "system"),
    ] {
        let pickle = Pickle(vec![0x80, 2]).raw(format!("c{module}\n{name}\n)R.").as_bytes());
        assert_eq!(forbidden(&pickle.0), format!("{module}.{name}"));
    }
    // NEWOBJ, NEWOBJ_EX and BUILD reach their class by a global too; the extension registry has no name at all.
    assert_eq!(forbidden(b"\x80\x02csubprocess\nPopen\n)\x81."), "subprocess.Popen");
    assert_eq!(forbidden(b"\x80\x04csubprocess\nPopen\n)}\x92."), "subprocess.Popen");
    assert!(matches!(problem_of(b"\x80\x02\x82\x01."), Problem::Pickle { .. }));
}

#[test]
fn a_malicious_reduce_nested_in_the_optimizer() {
    let pickle =
        Pickle(vec![0x80, 2]).raw(b"}(").text("model").raw(b"}").text("w").tensor("0", 4, 0, &[4], &[1]).raw(b"s");
    let pickle = pickle.text("optimizer").raw(b"}").text("state").raw(b"cos\nsystem\n").text("true").raw(b"\x85Rsu.");
    assert_eq!(forbidden(&pickle.0), "os.system");
}

#[test]
fn a_name_with_line_breaks_stays_one_line() {
    let pickle = Pickle(vec![0x80, 4]).text("os\nerror: all is well").text("system").raw(b"\x93.");
    assert_eq!(forbidden(&pickle.0), "os?error: all is well.system");
    let named = Pickle::dict("w\nok", |pickle| pickle.tensor("0", 4, 0, &[4], &[1]));
    assert!(matches!(problem_of(&named), Problem::Name { .. }));
}

#[test]
fn data_classes_are_skipped_and_hide_nothing() {
    let pickle =
        Pickle(vec![0x80, 2]).raw(b"}(").text("model").raw(b"}").text("w").tensor("0", 4, 0, &[4], &[1]).raw(b"s");
    let pickle =
        pickle.text("config").raw(b"comegaconf.dictconfig\nDictConfig\n)\x81}").text("_content").int(3).raw(b"sb");
    let pickle = pickle.text("args").raw(b"cargparse\nNamespace\n)\x81}b").text("epoch").int(9).raw(b"u.");
    let file = open(&archive(&pickle.0));
    assert_eq!(file.entries().len(), 1);
    assert_eq!(file.metadata().get("epoch").map(String::as_str), Some("9"));
    // As a tensor such an object is not there.
    let object = Pickle::dict("w", |pickle| pickle.raw(b"cargparse\nNamespace\n)\x81"));
    assert!(matches!(problem_of(&object), Problem::NoTensors { .. }));
}

#[test]
fn truncated_at_every_byte() {
    let whole = archive(&good());
    for length in 0..whole.len() {
        problem(&whole[..length]);
    }
    assert_eq!(problem(&whole[..whole.len() - 1]), Problem::Truncated { part: "its zip directory".into() });
    let legacy = fs::read(torch_fixture("legacy.pth")).unwrap();
    for length in (0..legacy.len()).step_by(7).chain(legacy.len() - 40..legacy.len()) {
        problem(&legacy[..length]);
    }
    assert!(matches!(problem(&legacy[..legacy.len() - 1]), Problem::Truncated { .. }));
}

#[test]
fn an_encrypted_archive() {
    let mut bytes = archive(&good());
    let central = bytes.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    bytes[central + 8] |= 1;
    assert_eq!(problem(&bytes), Problem::Encrypted { entry: "a/data.pkl".into() });
}

#[test]
fn a_zip_bomb_is_never_unpacked() {
    let bytes = archive(&good());
    let central = bytes.windows(4).position(|window| window == b"PK\x01\x02").unwrap();
    // Deflated, to 4 GiB less a byte or so.
    let mut bomb = bytes.clone();
    bomb[central + 10] = 8;
    bomb[central + 24..central + 28].copy_from_slice(&0xffff_fff0u32.to_le_bytes());
    assert_eq!(problem(&bomb), Problem::Compressed { entry: "a/data.pkl".into(), method: 8 });
    // Stored, yet larger than it is.
    let mut liar = bytes.clone();
    liar[central + 24..central + 28].copy_from_slice(&0xffff_fff0u32.to_le_bytes());
    assert!(matches!(problem(&liar), Problem::Archive { .. }));
    // Both sizes larger than the file.
    liar[central + 20..central + 24].copy_from_slice(&0xffff_fff0u32.to_le_bytes());
    assert!(matches!(problem(&liar), Problem::Archive { message } if message.contains("reaches beyond")));
    // 64-bit sizes that are not there.
    liar[central + 20..central + 28].copy_from_slice(&[0xff; 8]);
    assert!(matches!(problem(&liar), Problem::Archive { message } if message.contains("lacks its 64-bit sizes")));
}

#[test]
fn entries_that_overlap_and_entries_of_one_name() {
    // Two directory entries for the same bytes.
    let bytes = zip(&[("a/data.pkl", &good()), ("a/data/0", &[0; 16]), ("a/data/1", &[0; 16])]);
    let central: Vec<usize> = (0..bytes.len() - 4).filter(|&at| &bytes[at..at + 4] == b"PK\x01\x02").collect();
    let mut overlapping = bytes.clone();
    let first = bytes[central[1] + 42..central[1] + 46].to_vec();
    overlapping[central[2] + 42..central[2] + 46].copy_from_slice(&first);
    let name = central[2] + 46 + "a/data/".len();
    overlapping[name] = b'0';
    assert!(matches!(problem(&overlapping), Problem::Archive { message } if message.contains("two entries")));
    let twice = zip(&[("a/data.pkl", &good()), ("a/data/0", &[0; 16]), ("a/data/0", &[0; 16])]);
    assert!(matches!(problem(&twice), Problem::Archive { message } if message.contains("two entries")));
    // An entry that reaches into the next.
    let mut reaching = bytes.clone();
    for field in [20, 24] {
        reaching[central[1] + field..central[1] + field + 4].copy_from_slice(&40u32.to_le_bytes());
    }
    assert!(matches!(problem(&reaching), Problem::Archive { message } if message.contains("overlap")));
    // An entry called otherwise in its own header.
    let mut renamed = bytes;
    let name = central[2] + 46 + "a/data/".len();
    renamed[name] = b'7';
    assert!(matches!(problem(&renamed), Problem::Archive { message } if message.contains("another name")));
}

#[test]
fn a_directory_that_lies_about_its_place_and_size() {
    let bytes = archive(&good());
    let end = bytes.len() - 22;
    for (field, value) in [(16, u32::MAX - 1), (12, u32::MAX - 1), (16, 0), (12, 3)] {
        let mut lying = bytes.clone();
        lying[end + field..end + field + 4].copy_from_slice(&value.to_le_bytes());
        assert!(matches!(problem(&lying), Problem::Archive { .. }), "{field} {value}");
    }
    let mut many = bytes.clone();
    many[end + 10..end + 12].copy_from_slice(&u16::MAX.to_le_bytes());
    assert!(matches!(problem(&many), Problem::Archive { message } if message.contains("cannot hold 65535 entries")));
    // A zip64 record that is elsewhere than its locator says.
    for place in [0u64, 7, u64::MAX] {
        let mut wide = bytes[..end].to_vec();
        wide.extend([&b"PK\x06\x07\0\0\0\0"[..], &place.to_le_bytes(), &1u32.to_le_bytes()].concat());
        wide.extend(&bytes[end..]);
        assert!(matches!(problem(&wide), Problem::Archive { message } if message.contains("zip64")), "{place}");
    }
}

#[test]
fn tensors_outside_their_storage() {
    for (elements, offset, shape, strides) in [
        (4, 1, &[4][..], &[1][..]),
        (4, 0, &[5], &[1]),
        (4, 5, &[0], &[1]),
        (4, 0, &[2, 2], &[3, 1]),
        (4, i64::MAX, &[1], &[1]),
        (4, 0, &[i64::MAX, 2], &[1, 1]),
        (4, 0, &[2], &[i64::MAX]),
        (4, 0, &[0, i64::MAX, i64::MAX], &[1, 1, 1]),
    ] {
        let pickle = Pickle::dict("w", |pickle| pickle.tensor("0", elements, offset, shape, strides));
        assert!(matches!(problem_of(&pickle), Problem::Tensor { .. }), "{offset} {shape:?} {strides:?}");
    }
}

#[test]
fn negative_sizes_strides_and_offsets() {
    for (offset, shape, strides) in
        [(0, &[-1][..], &[1][..]), (3, &[4], &[-1]), (-1, &[1], &[1]), (0, &[-2, -2], &[2, 1]), (0, &[2], &[1, 1])]
    {
        let pickle = Pickle::dict("w", |pickle| pickle.tensor("0", 4, offset, shape, strides));
        let found = problem_of(&pickle);
        assert!(matches!(found, Problem::Tensor { .. }), "{found}");
    }
}

#[test]
fn a_tensor_that_repeats_its_elements_cannot_grow() {
    let huge = Pickle::dict("w", |pickle| pickle.tensor("0", 4, 0, &[1 << 40], &[0]));
    assert!(matches!(problem_of(&huge), Problem::Tensor { message, .. } if message.contains("overlap")));
    let windows = Pickle::dict("w", |pickle| pickle.tensor("0", 4, 0, &[3, 2], &[1, 1]));
    assert!(matches!(problem_of(&windows), Problem::Tensor { message, .. } if message.contains("overlap")));
    // The stride of an axis of size 1 says nothing.
    let one = Pickle::dict("w", |pickle| pickle.tensor("0", 4, 0, &[1, 4], &[0, 1]));
    assert_eq!(values(&open(&archive(&one)), "w"), [1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn storages_that_are_missing_or_of_another_size() {
    let missing = Pickle::dict("w", |pickle| pickle.tensor("7", 4, 0, &[4], &[1]));
    assert!(matches!(problem_of(&missing), Problem::Storage { key, .. } if key == "7"));
    for elements in [3, 5, -4, i64::MAX, 1 << 62] {
        let pickle = Pickle::dict("w", |pickle| pickle.tensor("0", elements, 0, &[1], &[1]));
        assert!(matches!(problem_of(&pickle), Problem::Storage { .. }), "{elements}");
    }
}

#[test]
fn a_storage_key_with_a_path_leads_nowhere() {
    for key in ["../data.pkl", "/etc/passwd", "..", "../../secret", "0/../0"] {
        let pickle = Pickle::dict("w", |pickle| pickle.tensor(key, 4, 0, &[4], &[1]));
        assert!(matches!(problem_of(&pickle), Problem::Storage { .. }), "{key}");
    }
    let long = Pickle::dict("w", |pickle| pickle.tensor(&"0".repeat(1000), 4, 0, &[4], &[1]));
    assert!(matches!(problem_of(&long), Problem::Pickle { .. }));
}

#[test]
fn dictionaries_inside_each_other_without_end() {
    let deep = |levels: usize| {
        let pickle = (0..levels).fold(Pickle(vec![0x80, 2]).raw(b"}"), |pickle, _| pickle.text("d").raw(b"}"));
        let pickle = pickle.text("w").tensor("0", 4, 0, &[4], &[1]);
        (0..=levels).fold(pickle, |pickle, _| pickle.raw(b"s")).raw(b".").0
    };
    let under_model =
        |levels: usize| Pickle::dict("model", |pickle| pickle.raw(&deep(levels)[2..deep(levels).len() - 1]));
    assert_eq!(open(&archive(&under_model(20))).entries()[0].0.matches("d.").count(), 20);
    assert!(matches!(problem_of(&under_model(40)), Problem::Limit { .. }));
    assert!(matches!(problem_of(&under_model(100_000)), Problem::Limit { .. }));
    // A dictionary that holds itself: memo 0 is the dictionary.
    let pickle = Pickle(vec![0x80, 2]).raw(b"}").text("model").raw(b"}q\x00(").text("self").raw(b"h\x00u");
    assert!(matches!(problem_of(&pickle.raw(b"s.").0), Problem::Limit { .. }));
}

#[test]
fn nested_tuples_and_lists_cost_no_stack() {
    for opening in [&b"]"[..], b"(", b"}"] {
        let pickle = [&b"\x80\x02"[..], &opening.repeat(500_000), b"."].concat();
        problem_of(&pickle);
    }
    let tuples = [&b"\x80\x02N"[..], &b"\x85".repeat(500_000), b"."].concat();
    assert!(matches!(problem_of(&tuples), Problem::NoTensors { .. }));
}

#[test]
fn memo_bombs_that_double_at_each_step() {
    // d1 = {a: d0, b: d0}, d2 = {a: d1, b: d1}, …: 2^30 names of one tensor.
    let mut pickle = Pickle(vec![0x80, 2]).raw(b"}").text("w").tensor("0", 4, 0, &[4], &[1]).raw(b"sq\x00");
    for i in 0..30u8 {
        pickle = pickle.raw(b"0}(").text("a").raw(&[b'h', i]).text("b").raw(&[b'h', i]).raw(&[b'u', b'q', i + 1]);
    }
    let pickle = pickle.raw(b"0}").text("model").raw(b"h\x1es.");
    assert!(matches!(problem_of(&pickle.0), Problem::Limit { what: "keys", .. }));
    // Millions of values, and of copies of one long list.
    let values = [&b"\x80\x02"[..], &b"]".repeat(3_000_000), b"."].concat();
    assert!(matches!(problem_of(&values), Problem::Limit { .. }));
    let list = [&b"\x80\x02]q\x00("[..], &b"NN\x86".repeat(100_000), b"e"].concat();
    let copies = [&list[..], &b"ccollections\nOrderedDict\nh\x00\x85R0".repeat(1000), b"."].concat();
    assert!(matches!(problem_of(&copies), Problem::Limit { .. }));
}

#[test]
fn long_keys_above_many_names() {
    // 30 dictionaries inside each other, each under a long key, and one tensor under many numbers: a small file of names without end.
    let file = |numbers: i64| {
        let levels = 30;
        Pickle::dict("model", |pickle| {
            let pickle = (0..levels).fold(pickle.raw(b"}"), |pickle, _| pickle.text(&"k".repeat(1000)).raw(b"}"));
            let pickle = pickle.raw(b"(").int(0).tensor("0", 4, 0, &[4], &[1]).raw(b"q\x00");
            let pickle = (1..numbers).fold(pickle, |pickle, number| pickle.int(number).raw(b"h\x00"));
            pickle.raw(b"u").raw(&b"s".repeat(levels))
        })
    };
    assert_eq!(open(&archive(&file(100))).entries().len(), 100);
    let bomb = file(10_000);
    assert!(bomb.len() < 200_000);
    assert!(matches!(problem_of(&bomb), Problem::Limit { what: "bytes of names", .. }));
}

#[test]
fn lengths_beyond_the_pickle() {
    for pickle in [
        &b"\x80\x02X\xff\xff\xff\xff"[..],
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x80\x02\x8b\xff\xff\xff\xff",
        b"\x80\x02ctorch",
        b"\x80",
        b"",
    ] {
        assert!(matches!(problem_of(pickle), Problem::Truncated { .. }), "{pickle:?}");
    }
}

#[test]
fn stacks_and_memos_that_are_not_there() {
    for pickle in [
        &b"\x80\x02."[..],
        b"\x80\x02s.",
        b"\x80\x02t.",
        b"\x80\x02h\x05.",
        b"\x80\x02(R.",
        b"\x80\x02NNR.",
        b"\x80\x02}Nu.",
        b"\x80\x02N)Q.",
        b"\x80\x02NNs.",
        b"\x80\x02)b.",
    ] {
        assert!(matches!(problem_of(pickle), Problem::Pickle { .. }), "{pickle:?}");
    }
}

#[test]
fn calls_with_other_arguments_than_torch_gives() {
    for pickle in [
        &b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."[..],
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nN\x85R.",
        b"\x80\x02ctorch\nSize\n)R.",
    ] {
        assert!(matches!(problem_of(pickle), Problem::Call { .. }), "{pickle:?}");
    }
}

#[test]
fn files_of_other_kinds() {
    assert_eq!(problem(b""), Problem::Unknown);
    assert_eq!(problem(b"hello"), Problem::Unknown);
    // A pickle, but not of torch.save.
    assert_eq!(problem(b"\x80\x02}."), Problem::Unknown);
    let script = zip(&[("a/data.pkl", &good()), ("a/constants.pkl", b"\x80\x02)."), ("a/data/0", &[0; 16])]);
    assert_eq!(problem(&script), Problem::TorchScript);
    let big = zip(&[("a/data.pkl", &good()), ("a/byteorder", b"big"), ("a/data/0", &[0; 16])]);
    assert_eq!(problem(&big), Problem::ByteOrder { got: "big".into() });
    assert!(matches!(problem(&zip(&[("a/x", b"")])), Problem::Archive { .. }));
    let other = Pickle::dict("weights", |pickle| pickle.raw(b"}").text("w").tensor("0", 4, 0, &[4], &[1]).raw(b"s"));
    assert!(matches!(problem_of(&other), Problem::NoTensors { got } if got == "the keys weights"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// A file with some bytes changed either opens, and then every tensor reads, or gives one line.
    #[test]
    fn changed_bytes_never_panic(fixture in 0usize..4, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        let name = ["zip.pth", "legacy.pth", "oldest.tar", "protocol4.pth"][fixture];
        let mut bytes = fs::read(torch_fixture(name)).unwrap();
        for (place, value) in changes {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        let (_directory, path) = written(&bytes);
        match TorchFile::open(&path) {
            Ok(file) => {
                for (name, info) in file.entries() {
                    prop_assert_eq!(file.read(&name).unwrap().size(), info.shape);
                }
            }
            Err(error) => prop_assert_eq!(error.to_string().lines().count(), 1),
        }
        let _ = inspect(&path);
    }

    /// Random opcodes neither panic nor take long.
    #[test]
    fn random_pickles_never_panic(opcodes in prop::collection::vec(any::<u8>(), 0..200)) {
        let (_directory, path) = written(&archive(&opcodes));
        if let Err(error) = TorchFile::open(&path) {
            prop_assert_eq!(error.to_string().lines().count(), 1);
        }
    }

    /// Opcodes that are known, in any order: the deep paths of the machine.
    #[test]
    fn shuffled_opcodes_never_panic(picks in prop::collection::vec(0usize..24, 0..80)) {
        const PARTS: [&[u8]; 24] = [
            b"N", b"\x88", b"K\x01", b"(", b")", b"]", b"}", b"t", b"l", b"d", b"\x85", b"\x86", b"a", b"e", b"s", b"u", b"q\x00", b"h\x00",
            b"0", b"1", b"2", b"R", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
        ];
        let pickle: Vec<u8> = picks.iter().flat_map(|&pick| PARTS[pick]).copied().chain(*b".").collect();
        let (_directory, path) = written(&archive(&pickle));
        if let Err(error) = TorchFile::open(&path) {
            prop_assert_eq!(error.to_string().lines().count(), 1);
        }
    }
}
