//! Source text: comments blanked, entire words, brackets, lists.

fn is_name(c: u8) -> bool {
    c.is_ascii_alphanumeric() || c == b'_'
}

/// Returns the length of the name that `text` begins with; zero if it begins with something else.
pub fn name_length(text: &str) -> usize {
    text.bytes().take_while(|&c| is_name(c)).count()
}

/// Returns the positions of `word` as an entire word of `text`.
pub fn words<'t>(text: &'t str, word: &'t str) -> impl Iterator<Item = usize> + 't {
    let bytes = text.as_bytes();
    text.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = at.checked_sub(1).is_some_and(|i| is_name(bytes[i]));
        let after = bytes.get(at + word.len()).is_some_and(|&c| is_name(c));
        !before && !after
    })
}

/// Returns the line of a position, counted from 1.
pub fn line_of(text: &str, at: usize) -> usize {
    1 + text[..at].matches('\n').count()
}

/// Returns the text with comments and the contents of strings blanked; every position keeps its meaning.
pub fn blanked(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = bytes.to_vec();
    let mut i = 0;
    let blank = |out: &mut Vec<u8>, from: usize, to: usize| {
        for byte in &mut out[from..to] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    };
    while i < bytes.len() {
        let rest = &source.as_bytes()[i..];
        let end = if rest.starts_with(b"//") {
            rest.iter().position(|&c| c == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            let close = rest.windows(2).skip(2).position(|pair| pair == b"*/");
            close.map_or(rest.len(), |close| close + 4)
        } else if rest[0] == b'"' || rest[0] == b'\'' {
            let mut k = 1;
            while k < rest.len() && rest[k] != rest[0] && rest[k] != b'\n' {
                k += if rest[k] == b'\\' { 2 } else { 1 };
            }
            // The quotes stay.
            let close = k.min(rest.len());
            blank(&mut out, i + 1, i + close);
            i += (close + 1).min(rest.len());
            continue;
        } else {
            i += 1;
            continue;
        };
        blank(&mut out, i, i + end);
        i += end;
    }
    String::from_utf8(out).unwrap_or_else(|_| source.to_owned())
}

/// Returns the position after the bracket that closes the one at `open`; `None` if there is no bracket, or none closes it.
pub fn closing(text: &str, open: usize) -> Option<usize> {
    let bytes = text.as_bytes();
    let (up, down) = match bytes.get(open)? {
        b'(' => (b'(', b')'),
        b'[' => (b'[', b']'),
        b'{' => (b'{', b'}'),
        _ => return None,
    };
    let mut depth = 0_usize;
    for (i, &c) in bytes.iter().enumerate().skip(open) {
        if c == up {
            depth += 1;
        } else if c == down {
            depth -= 1;
            if depth == 0 {
                return Some(i + 1);
            }
        }
    }
    None
}

/// Splits at commas outside of brackets; the parts are trimmed, and an empty last one is left out.
pub fn parts(text: &str) -> Vec<&str> {
    let (mut all, mut depth, mut from) = (Vec::new(), 0_i32, 0);
    for (i, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' | '<' => depth += 1,
            ')' | ']' | '}' | '>' => depth -= 1,
            ',' if depth == 0 => {
                all.push(text[from..i].trim());
                from = i + 1;
            }
            _ => {}
        }
    }
    let last = text[from..].trim();
    if !last.is_empty() {
        all.push(last);
    }
    all
}
