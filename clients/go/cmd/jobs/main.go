// Command jobs queues jobs on a hidream-grpc server, follows them through restarts, and fetches what
// they have drawn.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/hidream-grpc/hidream-grpc/clients/go/hidream"
	hidreamv1 "github.com/hidream-grpc/hidream-grpc/clients/go/hidream/v1"
	"github.com/hidream-grpc/hidream-grpc/clients/go/internal/flags"
	"github.com/hidream-grpc/hidream-grpc/clients/go/internal/report"
)

const usage = `usage: jobs [-address HOST:PORT] [-tls] [-ca-file FILE] [-cert-file FILE -key-file FILE] COMMAND
  submit -prompt TEXT [-seed N] [-width N -height N] [-steps N] [-model NAME]
                               queue a job, print its id
  batch                        queue the jobs of stdin, all or none: a SubmitJobRequest as JSON a line
  get JOB_ID                   print a job as it is now
  list [STATE]                 print all jobs, or those in a state such as RUNNING
  watch JOB_ID                 follow a job to its end
  watch-all                    print every change of every job
  cancel JOB_ID                stop a job at its next step
  delete JOB_ID                delete a job that has ended
  download JOB_ID INDEX FILE   write an image; goes on where it broke off
`

// command runs with the arguments behind its name.
type command func(ctx context.Context, client *hidream.Client, arguments []string) error

var commands = map[string]command{
	"submit": submit, "batch": batch, "get": get, "list": list, "watch": watch, "watch-all": watchAll,
	"cancel": cancel, "delete": remove, "download": download,
}

var errUsage = errors.New("wrong arguments\n" + usage)

func main() {
	server := flags.ServerOf(flag.CommandLine)
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, server, flag.Args()); err != nil {
		report.Error("jobs", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, server *flags.Server, arguments []string) error {
	if len(arguments) == 0 || commands[arguments[0]] == nil {
		return errUsage
	}
	connection, err := server.Connect()
	if err != nil {
		return err
	}
	defer connection.Close()
	return commands[arguments[0]](ctx, hidream.NewClient(connection), arguments[1:])
}

func submit(ctx context.Context, client *hidream.Client, arguments []string) error {
	set := flag.NewFlagSet("submit", flag.ContinueOnError)
	request := &hidreamv1.SubmitJobRequest{Spec: flags.Spec(set)}
	flags.Model(set, &request.Model)
	if err := set.Parse(arguments); err != nil {
		return err
	}
	job, err := client.Submit(ctx, request)
	if err != nil {
		return err
	}
	fmt.Println(job.GetJobId())
	return nil
}

func batch(ctx context.Context, client *hidream.Client, _ []string) error {
	var requests []*hidreamv1.SubmitJobRequest
	lines := bufio.NewScanner(os.Stdin)
	for number := 1; lines.Scan(); number++ {
		request := &hidreamv1.SubmitJobRequest{}
		if err := protojson.Unmarshal(lines.Bytes(), request); err != nil {
			return fmt.Errorf("line %d: %w", number, err)
		}
		requests = append(requests, request)
	}
	if err := lines.Err(); err != nil {
		return err
	}
	jobs, err := client.Batch(ctx, requests)
	for _, job := range jobs {
		fmt.Println(job.GetJobId())
	}
	return err
}

func get(ctx context.Context, client *hidream.Client, arguments []string) error {
	if len(arguments) != 1 {
		return errUsage
	}
	job, err := client.Get(ctx, arguments[0])
	if err != nil {
		return err
	}
	fmt.Println(protojson.Format(job))
	return nil
}

func list(ctx context.Context, client *hidream.Client, arguments []string) error {
	request := &hidreamv1.ListJobsRequest{}
	for _, name := range arguments {
		state, isKnown := hidreamv1.JobState_value["JOB_STATE_"+name]
		if !isKnown {
			return fmt.Errorf("%q is no state of a job", name)
		}
		request.States = append(request.States, hidreamv1.JobState(state))
	}
	for job, err := range client.List(ctx, request) {
		if err != nil {
			return err
		}
		printJob(job)
	}
	return nil
}

func watch(ctx context.Context, client *hidream.Client, arguments []string) error {
	if len(arguments) != 1 {
		return errUsage
	}
	images, err := client.Watch(ctx, arguments[0], report.Reconnecting(), report.Event)
	for _, image := range images {
		fmt.Printf("image %d: %d bytes\n", image.Info.GetIndex(), len(image.Data))
	}
	return err
}

func watchAll(ctx context.Context, client *hidream.Client, _ []string) error {
	return client.WatchAll(ctx, &hidreamv1.WatchJobsRequest{}, hidream.ReconnectPolicy{},
		func(change *hidreamv1.WatchJobsResponse) error {
			printJob(change.GetJob())
			return nil
		})
}

func cancel(ctx context.Context, client *hidream.Client, arguments []string) error {
	if len(arguments) != 1 {
		return errUsage
	}
	job, err := client.Cancel(ctx, arguments[0])
	if err != nil {
		return err
	}
	printJob(job)
	return nil
}

func remove(ctx context.Context, client *hidream.Client, arguments []string) error {
	if len(arguments) != 1 {
		return errUsage
	}
	return client.Delete(ctx, arguments[0])
}

func download(ctx context.Context, client *hidream.Client, arguments []string) error {
	if len(arguments) != 3 {
		return errUsage
	}
	jobID, path := arguments[0], arguments[2]
	var index int32
	if _, err := fmt.Sscan(arguments[1], &index); err != nil {
		return fmt.Errorf("%q is no index of an image", arguments[1])
	}
	if _, err := client.Download(ctx, jobID, index, path, hidream.ReconnectPolicy{}); err != nil {
		return err
	}
	fmt.Println(path)
	return nil
}

func printJob(job *hidreamv1.Job) {
	fmt.Printf("%s %s\n", job.GetJobId(), job.GetState().String()[len("JOB_STATE_"):])
}
