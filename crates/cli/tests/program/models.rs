//! Commands on a good model: the golden case of stage 2.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::{blip2, golden};

fn generate_case() -> Value {
    serde_json::from_slice(&fs::read(golden("stage2_llama").join("generate.json")).unwrap()).unwrap()
}

/// `generate` on all images and prompts of the golden case.
fn generate(more: &[&str]) -> Vec<OsString> {
    let (case, folder) = (generate_case(), golden("stage2_llama"));
    let mut arguments: Vec<OsString> =
        vec!["generate".into(), "--model".into(), folder.clone().into(), "--image".into()];
    arguments.extend(case["images"].as_array().unwrap().iter().map(|name| folder.join(name.as_str().unwrap()).into()));
    for prompt in case["prompts"].as_array().unwrap() {
        arguments.extend(["--prompt".into(), prompt.as_str().unwrap().into()]);
    }
    for (option, key) in [
        ("max-new-tokens", "max_new_tokens"),
        ("min-new-tokens", "min_new_tokens"),
        ("length-penalty", "length_penalty"),
    ] {
        arguments.extend([format!("--{option}").into(), case[key].to_string().into()]);
    }
    arguments.extend(["--device", "cpu"].iter().chain(more).map(OsString::from));
    arguments
}

#[test]
fn captions_as_json_equal_transformers() {
    let case = generate_case();
    for (beams, output) in [("1", "beams_1"), ("3", "beams_3")] {
        let printed = blip2(generate(&["--json", "--num-beams", beams])).success();
        let lines: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let expected = case["outputs"][output].as_array().unwrap();
        assert_eq!(lines.len(), expected.len());
        for ((line, ids), name) in lines.iter().zip(expected).zip(case["images"].as_array().unwrap()) {
            assert_eq!(line["image"], json!(golden("stage2_llama").join(name.as_str().unwrap())));
            let until_eos: Vec<&Value> = ids.as_array().unwrap().iter().take_while(|&id| id != &json!(3)).collect();
            assert_eq!(line["ids"], json!(until_eos), "{output}");
            let words: Vec<String> = until_eos.iter().map(|id| format!("t{id}")).collect();
            assert_eq!(line["text"], words.join(" "));
            assert_eq!(line.as_object().unwrap().len(), 3);
        }
    }
}

#[test]
fn captions_as_text_are_a_line_for_each_image() {
    let printed = blip2(generate(&[])).success();
    let lines: Vec<&str> = printed.lines().collect();
    assert_eq!(lines.len(), 6);
    assert!(lines[0].ends_with("image_0.png: t103 t11 t11 t11 t11 t103 t103 t11"), "{}", lines[0]);
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_blip2"))
        .args(generate(&["--json"]))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!((child.wait().unwrap().code(), stderr.as_str()), (Some(0), ""));
}

#[test]
fn inspect_counts_what_the_model_holds() {
    let folder = golden("stage2_llama");
    let found: Value =
        serde_json::from_str(&blip2(["inspect".into(), folder.clone(), "--json".into()]).success()).unwrap();
    assert_eq!(found["contents"], "blip2_directory");
    let tensors: u64 = found["groups"].as_array().unwrap().iter().map(|group| group["tensors"].as_u64().unwrap()).sum();
    let text = blip2(["inspect".into(), folder]).success();
    let total: Vec<&str> = text.lines().find(|line| line.starts_with("total")).unwrap().split_whitespace().collect();
    assert_eq!(total[1], tensors.to_string());
    let parts: u64 = found["parts"].as_array().unwrap().iter().map(|part| part["loaded"].as_u64().unwrap()).sum();
    assert_eq!(parts, tensors, "each part takes its tensors, and none is left over");
    assert!(text.lines().any(|line| line.starts_with("image encoder")), "{text}");
}

#[test]
fn replay_prints_the_losses_that_it_writes() {
    let out = tempfile::tempdir().unwrap();
    let folder = golden("stage2_llama");
    let arguments: [(&str, PathBuf); 4] = [
        ("--model", folder.clone()),
        ("--batch", folder.join("batch.safetensors")),
        ("--out", out.path().join("out.rank{rank}.safetensors")),
        ("--task", "stage2".into()),
    ];
    let arguments = arguments.into_iter().flat_map(|(option, value)| [PathBuf::from(option), value]);
    let printed = blip2(std::iter::once("replay".into()).chain(arguments)).success();
    let (name, loss) = printed.trim_end().split_once(' ').unwrap();
    let written = fs::read(out.path().join("out.rank0.safetensors")).unwrap();
    let header_bytes = u64::from_le_bytes(written[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&written[8..8 + header_bytes]).unwrap();
    let begin = 8 + header_bytes + header["loss"]["data_offsets"][0].as_u64().unwrap() as usize;
    let stored = f32::from_le_bytes(written[begin..begin + 4].try_into().unwrap());
    assert_eq!(name, "loss");
    assert_eq!(loss.parse::<f32>().unwrap(), stored);
    assert!(header.get("grad/query_tokens").is_some());
}
