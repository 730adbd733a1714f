// Asks for ranked lists from Go, by the KServe v2 protocol alone:
//
//	go run . -top-k 5 -option exclude_seen=false -option 'caps={"brand": 2}' 127.0.0.1:8001 u1 u2
//
// Prints a line for each item: user, release, degraded, item, score, task=probability …, with tabs between.
package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"google.golang.org/grpc"

	"recommend/inference"
)

// options holds a request's parameters; numbers and truth values go as such, all else as text or JSON.
type options map[string]*inference.InferParameter

func (o options) String() string { return "" }

func (o options) Set(text string) error {
	at := strings.Index(text, "=")
	if at < 1 {
		return fmt.Errorf("write NAME=VALUE")
	}
	o[text[:at]] = parameter(text[at+1:])
	return nil
}

func parameter(text string) *inference.InferParameter {
	if number, err := strconv.ParseInt(text, 10, 64); err == nil {
		return &inference.InferParameter{ParameterChoice: &inference.InferParameter_Int64Param{Int64Param: number}}
	}
	if text == "true" || text == "false" {
		truth := &inference.InferParameter_BoolParam{BoolParam: text == "true"}
		return &inference.InferParameter{ParameterChoice: truth}
	}
	return &inference.InferParameter{ParameterChoice: &inference.InferParameter_StringParam{StringParam: text}}
}

// Answer is one user's list: K items, and T probabilities of each.
type Answer struct {
	Release       string
	Degraded      int64
	ItemIDs       []string
	Scores        []float32
	Tasks         []string
	Probabilities []float32
}

// Recommend asks about users. It sets no deadline and cancels nothing: below Triton 2.59 either can end the
// server. The option budget_ms bounds a call.
func Recommend(client inference.GRPCInferenceServiceClient, users []string, with options) ([]Answer, error) {
	ids := make([][]byte, len(users))
	for at, user := range users {
		ids[at] = []byte(user)
	}
	reply, err := client.ModelInfer(context.Background(), &inference.ModelInferRequest{
		ModelName:  "recommend",
		Parameters: with,
		Inputs: []*inference.ModelInferRequest_InferInputTensor{{
			Name: "user_id", Datatype: "BYTES", Shape: []int64{int64(len(users)), 1},
			Contents: &inference.InferTensorContents{BytesContents: ids},
		}},
	})
	if err != nil {
		return nil, err
	}
	return answers(reply, len(users))
}

// answers cuts the answer's tensors, each a matrix with a line for each user.
func answers(reply *inference.ModelInferResponse, users int) ([]Answer, error) {
	raw := map[string][]byte{}
	for at, tensor := range reply.Outputs {
		raw[tensor.Name] = reply.RawOutputContents[at]
	}
	found := make([]Answer, users)
	ids, scores, values := texts(raw["item_ids"]), floats(raw["scores"]), floats(raw["probabilities"])
	releases, tasks := texts(raw["release"]), texts(raw["tasks"])
	for user := range found {
		one := &found[user]
		one.Release, one.Degraded = releases[user], int64(binary.LittleEndian.Uint64(raw["degraded"][8*user:]))
		if err := json.Unmarshal([]byte(tasks[user]), &one.Tasks); err != nil {
			return nil, err
		}
		wide, deep := len(ids)/users, len(values)/users
		one.ItemIDs, one.Scores = ids[user*wide:(user+1)*wide], scores[user*wide:(user+1)*wide]
		one.Probabilities = values[user*deep : (user+1)*deep]
	}
	return found, nil
}

func floats(raw []byte) []float32 {
	found := make([]float32, len(raw)/4)
	for at := range found {
		found[at] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*at:]))
	}
	return found
}

// texts reads each text behind its length in 4 bytes.
func texts(raw []byte) []string {
	var found []string
	for len(raw) > 0 {
		end := 4 + binary.LittleEndian.Uint32(raw)
		found, raw = append(found, string(raw[4:end])), raw[end:]
	}
	return found
}

func main() {
	with := options{}
	topK := flag.Int64("top-k", 10, "items wanted")
	flag.Var(with, "option", "a request's option, NAME=VALUE; may be given often")
	flag.Parse()
	if flag.NArg() < 2 {
		fail("write HOST:PORT USER …")
	}
	with["top_k"] = parameter(strconv.FormatInt(*topK, 10))
	connection, err := grpc.Dial(flag.Arg(0), grpc.WithInsecure())
	if err != nil {
		fail(err.Error())
	}
	defer connection.Close()
	users := flag.Args()[1:]
	lists, err := Recommend(inference.NewGRPCInferenceServiceClient(connection), users, with)
	if err != nil {
		fail(err.Error())
	}
	for at, list := range lists {
		for place, item := range list.ItemIDs {
			if item == "" { // a list may be shorter than top_k
				continue
			}
			fmt.Printf("%s\t%s\t%d\t%s\t%g", users[at], list.Release, list.Degraded, item, list.Scores[place])
			for task, name := range list.Tasks {
				fmt.Printf("\t%s=%g", name, list.Probabilities[place*len(list.Tasks)+task])
			}
			fmt.Println()
		}
	}
}

func fail(why string) {
	fmt.Fprintln(os.Stderr, "error:", why)
	os.Exit(1)
}
