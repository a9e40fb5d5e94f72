# litgpt: completion for fish
function __litgpt_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found ($words[1] __complete $words[2..] "$current" 2>/dev/null)
    set -l flag (string match -r -- '^--[^=]*=' "$current")
    if test "$found[1]" = ":files"
        set -e found[1]
        __fish_complete_path (string replace -r -- '^--[^=]*=' '' "$current") | string replace -r '^' "$flag"
    end
    printf '%s\n' $flag$found
end
complete -c litgpt -f -a '(__litgpt_complete)'
