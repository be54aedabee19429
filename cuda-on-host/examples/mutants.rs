//! Writes every mutant of a kernel file into a folder, as `N.cu`, and a list of them, `list.tsv`: number, line, what was done.
//!
//! `cargo run -p cuda-on-host --example mutants -- kernels/pool.cu OUT`

use std::fmt::Write;
use std::path::Path;

use cuda_on_host::judge::mutants;

fn main() -> std::io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [source, out] = words.as_slice() else {
        eprintln!("usage: mutants KERNEL.cu FOLDER");
        std::process::exit(2);
    };
    let out = Path::new(out);
    std::fs::create_dir_all(out)?;
    let mut list = String::new();
    for (number, mutant) in mutants(&std::fs::read_to_string(source)?).iter().enumerate() {
        std::fs::write(out.join(format!("{number}.cu")), &mutant.text)?;
        let _ =
            writeln!(list, "{number}\t{}\t{}", mutant.line, mutant.what.replace(['\t', '\n'], " "));
    }
    std::fs::write(out.join("list.tsv"), list)
}
