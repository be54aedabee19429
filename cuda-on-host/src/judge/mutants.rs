//! Mutants: a source with one small fault each, by the operators that GPU mutation testing uses. A case that does not notice a
//! mutant would not notice that mistake.

use crate::source::{blanked, closing, line_of, words};

/// A mutant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mutant {
    /// The line that differs, counted from 1.
    pub line: usize,
    /// What was done to it.
    pub what: String,
    /// The whole text.
    pub text: String,
}

/// A replacement of `at..end`.
struct Edit {
    at: usize,
    end: usize,
    with: String,
    what: String,
}

/// Returns all mutants of a source, in the order of its lines.
pub fn mutants(source: &str) -> Vec<Mutant> {
    let code = blanked(source);
    // Preprocessor lines hold no statements.
    let code: String = code
        .split_inclusive('\n')
        .map(|line| {
            if line.trim_start().starts_with('#') {
                line.replace(|c| c != '\n', " ")
            } else {
                line.to_owned()
            }
        })
        .collect();
    if code.len() != source.len() {
        return Vec::new(); // text beyond ASCII on a preprocessor line: positions would not fit
    }
    let mut edits = Vec::new();
    barriers(&code, &mut edits);
    waits(source, &code, &mut edits);
    indices(source, &code, &mut edits);
    bounds(&code, &mut edits);
    atomics(&code, &mut edits);
    stores(&code, &mut edits);
    signs(&code, &mut edits);
    edits.sort_by_key(|edit| edit.at);
    let mutant = |edit: Edit| {
        let mut text = source.to_owned();
        text.replace_range(edit.at..edit.end, &edit.with);
        Mutant { line: line_of(source, edit.at), what: edit.what, text }
    };
    edits.into_iter().map(mutant).collect()
}

/// The end of a call's brackets, if the word at `at..end` is called.
fn call_end(code: &str, end: usize) -> Option<usize> {
    let open = end + code[end..].find(|c: char| !c.is_whitespace())?;
    code[open..].starts_with('(').then(|| closing(code, open)).flatten()
}

fn barriers(code: &str, edits: &mut Vec<Edit>) {
    for name in ["__syncthreads", "__syncwarp", "grid_barrier"] {
        for at in words(code, name) {
            // Not the definition of a function of that name.
            let called = call_end(code, at + name.len())
                .filter(|&end| code[end..].trim_start().starts_with(';'));
            if let Some(end) = called {
                edits.push(Edit {
                    at,
                    end,
                    with: "(void)0".into(),
                    what: format!("a barrier dropped: {name}"),
                });
            }
        }
    }
}

/// Waits for asynchronous copies: `cp_async_wait…()` and the instruction itself.
fn waits(source: &str, code: &str, edits: &mut Vec<Edit>) {
    for (at, _) in code.match_indices("cp_async_wait") {
        let rest = &code[at..];
        let Some(open) = rest.find('(') else { continue };
        if rest[..open].contains([';', '{', '\n']) {
            continue;
        }
        if let Some(end) = closing(code, at + open)
            && code[end..].trim_start().starts_with(';')
        {
            edits.push(Edit {
                at,
                end,
                with: "(void)0".into(),
                what: "a wait for copies dropped".into(),
            });
        }
    }
    for at in ["asm", "__asm__"].into_iter().flat_map(|word| words(code, word)) {
        let Some(open) = code[at..].find('(').map(|i| at + i) else { continue };
        if let Some(end) = closing(code, open)
            && source[open..end].contains("cp.async.wait")
        {
            edits.push(Edit {
                at,
                end,
                with: "(void)0".into(),
                what: "a wait for copies dropped".into(),
            });
        }
    }
}

fn last_word(text: &str) -> &str {
    let start = text.rfind(|c: char| !(c.is_alphanumeric() || c == '_')).map_or(0, |i| i + 1);
    &text[start..]
}

fn indices(source: &str, code: &str, edits: &mut Vec<Edit>) {
    for (open, _) in code.match_indices('[') {
        let Some(end) = closing(code, open) else { continue };
        let inner = source[open + 1..end - 1].trim();
        let before = &code[..open];
        let indexed = before.ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ']');
        if !indexed || inner.is_empty() {
            continue;
        }
        // `float s[64]` declares: a word, a star or a bracket of a template stands before the name.
        let mut name_at = open;
        while before[..name_at].ends_with(']') {
            name_at = match before[..name_at].rfind('[') {
                Some(at) => at,
                None => break,
            };
        }
        let name = last_word(&before[..name_at]);
        let earlier = before[..name_at - name.len()].trim_end_matches([' ', '\n']);
        let word = last_word(earlier);
        let declares =
            (!word.is_empty() && word != "return" && word != "else") || earlier.ends_with('>');
        let statement = &earlier[earlier.rfind([';', '{', '}']).map_or(0, |i| i + 1)..];
        if declares || statement.contains("__shared__") && !statement.contains('=') {
            continue;
        }
        edits.push(Edit {
            at: open,
            end,
            with: format!("[({inner}) + 1]"),
            what: format!("an index off by one: {name}[{inner}]"),
        });
    }
}

fn bounds(code: &str, edits: &mut Vec<Edit>) {
    for (from, to) in [(" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > ")] {
        for (at, _) in code.match_indices(from) {
            if code[..at].ends_with("template") {
                continue;
            }
            let what = format!("a bound relaxed: `{}` for `{}`", to.trim(), from.trim());
            edits.push(Edit { at, end: at + from.len(), with: to.into(), what });
        }
    }
}

fn atomics(code: &str, edits: &mut Vec<Edit>) {
    for name in ["atomicAdd", "atomicMax", "atomicMin", "atomicExch", "atomicOr"] {
        for at in words(code, name) {
            let with = format!("standin_plain_{}", name["atomic".len()..].to_lowercase());
            edits.push(Edit {
                at,
                end: at + name.len(),
                with,
                what: format!("an atomic made plain: {name}"),
            });
        }
    }
}

/// Stores to shared arrays that this file declares.
fn stores(code: &str, edits: &mut Vec<Edit>) {
    let mut names: Vec<&str> = words(code, "__shared__")
        .filter_map(|at| {
            let declaration = &code[at..at + code[at..].find([';', '='])?];
            Some(last_word(
                declaration[..declaration.find('[').unwrap_or(declaration.len())].trim_end(),
            ))
        })
        .filter(|name| !name.is_empty())
        .collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        for at in words(code, name) {
            // A statement of its own: after `;`, `{`, `}` or the `)` of a condition.
            if !code[..at].trim_end().ends_with([';', '{', '}', ')']) {
                continue;
            }
            let mut end = at + name.len();
            while code[end..].starts_with('[') {
                end = match closing(code, end) {
                    Some(end) => end,
                    None => break,
                };
            }
            let rest = code[end..].trim_start();
            let assigns =
                (rest.starts_with('=') && !rest.starts_with("==")) || rest.starts_with("+=");
            if let (true, Some(length)) = (assigns, code[at..].find(';')) {
                let what = format!("shared made stale: no store to {name}");
                edits.push(Edit { at, end: at + length, with: "(void)0".into(), what });
            }
        }
    }
}

fn signs(code: &str, edits: &mut Vec<Edit>) {
    for (from, to) in [(" + ", " - "), (" - ", " + "), (" += ", " -= "), (" -= ", " += ")] {
        for (at, _) in code.match_indices(from) {
            // The step of a loop: it would not end.
            let line = &code[code[..at].rfind('\n').map_or(0, |i| i + 1)..at];
            if from.contains('=') && line.contains("for (") {
                continue;
            }
            let what = format!("a sign turned: `{}` for `{}`", to.trim(), from.trim());
            edits.push(Edit { at, end: at + from.len(), with: to.into(), what });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operator_finds_its_place_and_leaves_the_rest() {
        let source = "__global__ void f(float* y, const float* x, int n) {\n\
            __shared__ float s[64];\n\
            int i = blockIdx.x * 64 + threadIdx.x;\n\
            s[threadIdx.x] = i < n ? x[i] : 0.0f; // x[0] < 1\n\
            __syncthreads();\n\
            atomicAdd(y, s[63 - threadIdx.x]);\n\
            asm volatile(\"cp.async.wait_all;\");\n\
            }\n";
        let all = mutants(source);
        let found: Vec<(usize, &str)> = all.iter().map(|m| (m.line, &*m.what)).collect();
        assert_eq!(
            found,
            [
                (3, "a sign turned: `-` for `+`"),
                (4, "shared made stale: no store to s"),
                (4, "an index off by one: s[threadIdx.x]"),
                (4, "a bound relaxed: `<=` for `<`"),
                (4, "an index off by one: x[i]"),
                (5, "a barrier dropped: __syncthreads"),
                (6, "an atomic made plain: atomicAdd"),
                (6, "an index off by one: s[63 - threadIdx.x]"),
                (6, "a sign turned: `+` for `-`"),
                (7, "a wait for copies dropped"),
            ]
        );
        assert!(all[7].text.contains("s[(63 - threadIdx.x) + 1]"));
        assert!(all.iter().all(|m| m.text.lines().count() == source.lines().count()));
    }
}
